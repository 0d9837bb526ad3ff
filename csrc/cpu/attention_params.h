// What attention scores are told on the CPU.
#pragma once
#include "mlp_params.h"

namespace dien {

// A target and the steps it attends to.
struct Target {
  int64_t u, length;   // its history, and a bound on the history's valid steps
  int64_t states;      // element offset of the first step
  int64_t mask;        // the same in the mask
  int64_t scores, da;  // element of the contiguous scores, and of their gradient, at the first step
};

struct AttentionCall {
  int64_t batch, histories, hidden, size;  // hidden: features of a state; size: of a target
  int64_t longest, chunk_tokens;           // the longest history; steps worked on at a time
  bool bilinear, softmax, backward;
  double scale;
  Array target, states, da;  // s0 row, s1 step, s2 feature (a target's: s1)
  const bool* mask;          // or null: every step is valid
  int64_t mask_step;
  const Target* targets;
  // Targets of history u: rows_of_history[first_of_history[u] .. first_of_history[u + 1]).
  const int64_t *rows_of_history, *first_of_history;
  const int64_t* state_rows;  // rows of history u in dstates: state_rows[u] .. state_rows[u + 1]
  Mlp mlp;                    // bilinear: no layer, or one that is W
  void* scores;               // in the compute dtype, zeros before the forward
  void *dtarget, *dstates;    // in the storage dtype
  Workspace workspace;
  Threads threads;
};

}  // namespace dien
