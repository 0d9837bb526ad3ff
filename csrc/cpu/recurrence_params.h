// What the recurrence is told on the CPU.
#pragma once
#include "params.h"

namespace dien {

// One row of the batch by the layout rule: step s of the recurrence stands at `offset + s * step`, and the steps are in
// the call.
struct Row {
  int64_t length;
  int64_t b;          // its own index: of h0, h_n and their gradients
  int64_t u;          // the history it reads
  int64_t x;          // element offset in x
  int64_t dx;         // row in the contiguous dx, and in the shared projection
  int64_t y;          // row in the contiguous y
  int64_t kept;       // row of the first step in the kept gates, which are dense: no place for padding
  int64_t dy;         // element offset in dy
  int64_t attention;  // element offset
  int64_t da;         // element of the contiguous gradient of attention
};

// Kept gates are padded to this many units, whatever the instruction set: whole vectors, or half of one of sixteen
// lanes. KEPT_UNITS in dien_kernels/ops/_gates.py.
constexpr int64_t kKeptUnits = 8;

struct RecurrenceCall {
  int64_t batch, histories, steps, input, hidden;  // steps: the padded length
  int64_t longest;                                 // the longest row
  bool jagged, shared, time_major, backward;
  bool unpacked;  // so few steps that weights are used where they lie, not packed: forward only
  // the cell
  double alpha0, alpha1, beta0, beta1;
  bool scale_input, keep_side, reset_before;
  // inputs
  Array x, attention, w_ih, w_hh, b_ih, b_hh, h0;
  // rows, longest first, and the strides that go with them
  const Row* rows;
  int64_t x_step, dx_step, y_step, dy_step, attention_step, da_step;
  // where histories are shared: rows in their own order, of which those of history u are
  // by_index[rows_of_history[first_of_history[u] .. first_of_history[u + 1])], and the histories themselves as rows
  const Row *by_index, *history_rows;
  const int64_t *rows_of_history, *first_of_history;
  // forward results; y and h_n in the storage dtype, gates (r, u, n, hn) in the compute dtype or null
  void *y, *h_n, *gates;
  // backward inputs and results; weights' gradients in their storage dtype, the rest in the compute dtype
  Array dy, dh_n;
  void *dx, *da, *dw_ih, *dw_hh, *db_ih, *db_hh, *dh0;
  int64_t block_rows;    // rows that run in lockstep
  int64_t chunk_tokens;  // (row, step) pairs worked on at a time: what fits the second-level cache
  Workspace workspace;
  Threads threads;
};

}  // namespace dien
