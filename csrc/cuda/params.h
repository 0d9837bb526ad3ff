// The arguments of the CUDA kernels: plain numbers and pointers to device memory, no torch. Every launcher takes one of
// these structs and a stream, and returns the error of the launch.
#pragma once
#include <cstdint>

namespace dien::cuda {

constexpr float kLog2E = 1.4426950408889634f;

enum class Store : int32_t { f32, bf16, f16 };

// Where the steps of a row are (docs/design.md, "One layout"). The kernels clamp indices that are out of range.
struct Rows {
  const int64_t* order;    // [batch]: the rows from the longest to the shortest; null: the rows as they come
  const int64_t* lengths;  // [histories]: their lengths; null: all are `steps`, or the offsets give them
  const int64_t* offsets;  // [histories + 1]: where jagged histories begin in x; null: the layout is padded
  const int64_t* history;  // [batch]: the history that a row reads; null: row b reads history b
  const int64_t* y_start;  // [batch]: where jagged rows begin in y; null: where their histories begin in x
  int64_t batch, histories, steps, x_rows, y_rows;
  int32_t reverse, time_major;
};

// The form of the recurrence: equations (4) to (7) and (9) of docs/math.md.
struct Cell {
  float alpha0, alpha1, beta0, beta1;
  int32_t scale_input, keep_side, reset_before;
  int32_t hidden;  // H, which is even and at most the kernel's padded size P
};

// The inputs that forward and backward have in common.
struct Inputs {
  Rows rows;
  Cell cell;
  // W_ih x for every step of x: [x_rows, 3, P] with zeros from unit H on; x_rows is at least 1. For the forward it has
  // the storage dtype and, unless the input is scaled, contains all biases but b_hn (b_hn too, with the reset before
  // the product). For the backward it is float32, because rounding it would be the largest error of the attention's
  // gradient, and has no biases.
  const void* projection;
  const float* attention;    // [batch, steps], or jagged [y_rows]; null: there is none
  const void* w_hh;          // [3H, H], storage dtype
  const float *b_ih, *b_hh;  // [3H]; null: zero
  const float* h0;           // [batch, H]; null: zero
};

struct Forward {
  Inputs in;
  void* y;    // [y_rows, H], storage dtype; only existing steps are written. Null: only the last states are wanted
  void* h_n;  // [batch, H], storage dtype; never null
  // [3H, I], storage dtype, if the loop computes W_ih x. Then `in.projection` is x itself, [x_rows, I], with rows at
  // multiples of 8 bytes, and I is at most P and a multiple of 4. That takes 16-bit storage, P <= 64, the reset after
  // the product and an unscaled input. Null otherwise.
  const void* w_ih;
  int32_t input;       // I
  int32_t tiles_of_8;  // the most tiles of 8 rows that `forward16` may use: `rows_of_block` in forward16.cuh
  // For instances that stream their weights (Tile16::kStreamed), W_hh in the order in which threads read it: [3 gates,
  // P / 8 steps of the product, 4 P threads, 2]. Null otherwise.
  const void* streamed;
  int32_t resident;  // how many gates of `streamed` are kept in shared memory; set by the launcher
  float update;      // update_factor(keep_side)
};

// The factor f in u = 1 / (1 + 2^(f z)), equation (4) with z = gx_u + gh_u.
constexpr float update_factor(bool keep_side) { return keep_side ? kLog2E : -kLog2E; }

// The kernel writes gate gradients and states, from which the host computes dx and dW as products over all steps. Steps
// that do not exist are not written.
struct Backward {
  Inputs in;
  const void* y;     // [y_rows, H], storage dtype
  const void* dy;    // like y; null: zero
  const void* dh_n;  // [batch, H], storage dtype; null: zero
  // Where weights are streamed (float32, P > 64), W_hh and its transpose in the order in which threads read them:
  // [2, 3 gates, P / 8 steps of the product, P / 8 warps, 32 lanes, 2]. Null otherwise.
  const void* fragments;
  // [y_rows, G, P], storage dtype. With a scaled input G = 6: da_r, da_u, dgh_n, and gamma times da_r, da_u, da_n.
  // Otherwise G = 4 with the reset after the product: dgh_n, da_r, da_u, da_n; and G = 3 before it: da_r, da_u, da_n.
  void* gates;
  void* states;  // [y_rows, P], storage dtype: h before each step; with the reset before, [y_rows, 2, P]: h and r h
  float* d_attention;  // like attention; null: there is none
  float* d_bias;       // [tiles, 4, P]: sums over the tile's rows and steps of da_r, da_u, da_n, and dgh_n or zeros
  float* dh0;          // [batch, H]
};

struct SumRowsOfHistory {
  Rows rows;         // order and history are not read
  const void* from;  // [y_rows, width], storage dtype; the first `columns` columns are summed
  void* to;          // [x_rows, columns], storage dtype; steps that do not exist are not written
  // The rows of history u, in row order, are rows_of_history[first[u] .. first[u + 1]): [batch] and [histories + 1].
  const int64_t *rows_of_history, *first;
  int32_t columns, width;  // even
};

}  // namespace dien::cuda
