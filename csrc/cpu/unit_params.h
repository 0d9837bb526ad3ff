// What attention and auxiliary loss are told on the CPU: plain data, as params.h.
#pragma once
#include "params.h"

namespace dien {

// In the order of ACTIVATIONS in dien_kernels/ops/_mlp.py.
enum class Activation : int { sigmoid, relu, prelu, none };

// One layer. Numbers called `at` count values from the start of the packed weights, of a group's sums, or of a thread's
// working memory; the kernels' `lay_out` fills them.
struct Layer {
  int64_t in, out;
  Array weight, bias, slope;       // [out][in]; [out] or absent; [out], or [1] where `one_slope`, or absent
  void *dweight, *dbias, *dslope;  // results, contiguous; the last two in the compute dtype
  bool one_slope;
  int64_t in_padded, out_padded;
  int64_t forward_at, backward_at, bias_at, slope_at;  // packed
  int64_t dweight_at, dbias_at, dslope_at;             // sums
  int64_t z_at, a_at;                                  // working memory; a stands on z where z is not wanted again
};

struct Mlp {
  Layer* layers;
  int64_t count;
  Activation activation;
  Store gradients;  // dtype of dweight
};

// Memory of an op: sizes in bytes, by `lay_out`, and places, by the caller.
struct Room {
  int64_t packed_bytes, partial_bytes, scratch_bytes;  // partial: a group's sums; scratch: a thread's
  char *packed, *partial, *scratch;
  int64_t groups;  // fixed sets of tasks whose sums are made first
};

// A target and the steps it attends to.
struct Target {
  int64_t u, length;   // its history, and a bound on the history's valid steps
  int64_t states;      // element offset of the first step
  int64_t mask;        // the same in the mask
  int64_t scores, da;  // element of the contiguous scores, and of their gradient, at the first step
};

struct AttentionJob {
  int64_t batch, histories, hidden, size;  // size: of a target
  int64_t longest, chunk_tokens;
  bool bilinear, softmax, backward;
  double scale;
  Array target, states, da;  // s0 row, s1 step, s2 feature (a target's: s1)
  const bool* mask;          // or null: every step is valid
  int64_t mask_step;
  const Target* targets;
  const int64_t *readers, *first_reader;  // targets of history u: readers[first_reader[u] .. first_reader[u + 1])
  const int64_t* state_rows;              // rows of history u in dstates: state_rows[u] .. state_rows[u + 1]
  Mlp mlp;                                // bilinear: no layer, or one that is W
  void* scores;                           // in the compute dtype, zeros before the forward
  void *dtarget, *dstates;                // in the storage dtype
  // packed: of bilinear W, of din W_q + W_d; W_k - W_d and W_p; zeros; room to pack
  int64_t row_forward_at, row_rows_at, step_forward_at, step_backward_at, p_forward_at, p_backward_at, p_rows_at,
      zero_at;
  int64_t plain_at;
  int64_t drow_at, dstep_at, dp_at;  // their sums
  // working memory: of a target; of a chunk; of a history's steps
  int64_t q_at, dq_at, r_at, dr_at, matrix_at, dmatrix_at, keys_at, dkeys_at, x_at, d_at, sum_at, e_at, steps_at,
      line_at;
  Room room;
  Threads threads;
};

// A state's row and step, as strides count them (jagged: row 0, and its place), and the row whose weight it has.
struct Pair {
  int64_t row, step, of;
};

struct AuxiliaryJob {
  int64_t hidden, size, negatives;  // of a state, of a behaviour, K
  bool inner, backward;
  double eps;                        // negative: the clamp
  Array states, positive, negative;  // s0 row, s1 step, s2 feature; jagged: s0 = 0, a pair's step is its place
  int64_t negative_each;             // stride from one negative to the next
  int64_t ahead;                     // from a state to its behaviour, in steps
  int64_t dense_row;                 // steps from one row to the next in contiguous results
  const Pair* pairs;
  int64_t count, chunk_pairs;
  const double *positive_weight, *negative_weight;  // of each row's pairs
  Mlp mlp;
  double* losses;  // one for each group
  void *dstates, *dpositive, *dnegative;
  int64_t h_forward_at, h_backward_at, e_forward_at, e_backward_at, plain_at;  // packed W_h and W_e; room to pack
  int64_t dh_at, de_at;                                                        // sums
  int64_t states_at, behaviours_at, r_at, x_at, d_at;                          // working memory
  Room room;
  Threads threads;
};

}  // namespace dien
