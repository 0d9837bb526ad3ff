// What the auxiliary loss is told on the CPU.
#pragma once
#include "mlp_params.h"

namespace dien {

// A state's row and step, as strides count them (jagged: row 0, and the step among all steps), and the row of the batch
// whose weight it has.
struct Pair {
  int64_t row, step, of;
};

struct AuxiliaryLossCall {
  int64_t hidden, size, negatives;  // features of a state, features of a behaviour, K
  bool inner, backward;
  double eps;                        // negative: the clamp
  Array states, positive, negative;  // s0 row, s1 step, s2 feature; jagged: s0 = 0
  int64_t negative_each;             // stride from one negative to the next
  int64_t ahead;                     // from a state to its behaviour, in steps
  int64_t dense_row;                 // steps from one row to the next in contiguous results
  const Pair* pairs;
  int64_t count, chunk_pairs;                       // pairs in all, and those worked on at a time
  const double *positive_weight, *negative_weight;  // of each row's pairs
  Mlp mlp;
  double* losses;  // one for each group
  void *dstates, *dpositive, *dnegative;
  Workspace workspace;
  Threads threads;
};

}  // namespace dien
