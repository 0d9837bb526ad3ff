// What the CPU recurrence is told: plain data, no torch, no C++ library. Shared by every instruction set.
#pragma once
#include <cstdint>

namespace dien {

enum class Store : int { f32, f64, bf16 };

// A tensor as pointer and element strides; data is null where an optional tensor is absent.
struct Array {
  void* data;
  int64_t s0, s1, s2;
  Store store;
};

struct Threads {
  int count;
  void (*run)(int64_t tasks, void* context, void (*task)(void* context, int64_t index));
};

// One row of the batch by the layout rule: step s of the recurrence stands at `offset + s * step` (steps are in Job).
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

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Kept gates are padded to this many units, whatever the instruction set: whole vectors, or half of one of sixteen
// lanes. KEPT_UNITS in dien_kernels/ops/_gates.py.
constexpr int64_t kKeptUnits = 8;

struct Job {
  int64_t batch, histories, steps, input, hidden;  // steps: the padded length
  int64_t longest;                                 // the longest row
  bool jagged, shared, time_major;
  bool few;  // so few steps that weights are used where they lie, not packed: forward only
  // the cell
  double alpha0, alpha1, beta0, beta1;
  bool scale_input, keep_side, reset_before;
  // inputs
  Array x, attention, w_ih, w_hh, b_ih, b_hh, h0;
  // rows, longest first, and the strides that go with them
  const Row* rows;
  const Row* history_rows;  // in history order, where histories are shared
  const int64_t* readers;  // rows (positions in `by_index`) of history u: readers[first_reader[u] .. first_reader[u+1])
  const int64_t* first_reader;
  const Row* by_index;  // rows in their own order
  int64_t x_step, dx_step, y_step, dy_step, attention_step, da_step;
  // forward results; y and h_n in the storage dtype, gates (r, u, n, hn) in the compute dtype or null
  void *y, *h_n, *gates;
  // backward inputs and results; weights' gradients in their storage dtype, the rest in the compute dtype
  Array dy, dh_n;
  void *dx, *da, *dw_ih, *dw_hh, *db_ih, *db_hh, *dh0;
  // working memory
  int64_t block_rows;    // rows that run in lockstep
  int64_t chunk_tokens;  // (row, step) pairs worked on at a time: what fits the second-level cache
  int64_t groups;        // fixed sets of blocks whose weight gradients are summed first
  char *packed, *partial, *projection, *shared_gradient, *scratch;
  int64_t scratch_bytes;  // a thread
  Threads threads;
};

struct Sizes {
  int64_t packed;          // bytes of the packed weights,
  int64_t partial;         // of one group's gradient sums,
  int64_t projection_row;  // of one step of a shared history's projection, or of its gradient,
  int64_t scratch;         // of one thread's working memory
};

}  // namespace dien
