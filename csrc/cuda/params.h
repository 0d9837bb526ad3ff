// The arguments of the CUDA kernels: plain numbers and pointers to device memory, no torch. Every launcher takes one of
// these structs and a stream, and returns the error of the launch.
#pragma once
#include <cstdint>

namespace dien::cuda {

constexpr float kLog2E = 1.4426950408889634f;

enum class Store : int32_t { f32, bf16, f16 };

// Where the steps of a row are (docs/design.md, "One layout"). The kernels clamp indices that are out of range.
struct Rows {
  const int64_t* order;    // [batch]: rows from the longest to the shortest; null: in their own order
  const int64_t* lengths;  // [histories]; null: `steps`, or what the offsets say
  const int64_t* offsets;  // [histories + 1]; null: padded
  const int64_t* history;  // [batch]: the history a row reads; null: its own
  const int64_t* y_start;  // [batch]: its first step in y, where that is not its first step in x; null
  int64_t batch, histories, steps, x_rows, y_rows;
  int32_t reverse, time_major;
};

// Equations (4), (7) and (9) of docs/math.md.
struct Cell {
  float alpha0, alpha1, beta0, beta1;
  int32_t scale_input, keep_side, reset_before;
  int32_t hidden;  // H: even, at most the kernel's padded size P
};

// The inputs that forward and backward have in common.
struct Inputs {
  Rows rows;
  Cell cell;
  // W_ih x of every step of x, [x_rows, 3, P] with zeros from H on; x_rows is at least 1. For the forward in the
  // storage dtype and, unless the input is scaled, with all biases but b_hn in it (b_hn too, with the reset before the
  // product). For the backward in float32, without biases: its rounding would be the largest error of the attention's
  // gradient.
  const void* projection;
  const float* attention;    // [batch, steps], or one for each step of y; null: none
  const void* w_hh;          // [3H, H], storage dtype
  const float *b_ih, *b_hh;  // [3H]; null: zero
  const float* h0;           // [batch, H]; null: zero
};

struct Forward {
  Inputs in;
  void* y;    // [y_rows, H], storage dtype; only steps that exist are written. Null: only the last states are wanted
  void* h_n;  // [batch, H], storage dtype; never null
  // [3H, I], storage dtype, with I at most P and a multiple of 4: `in.projection` is x itself, [x_rows, I], whose rows
  // are at multiples of 8 bytes, and the loop makes the product. 16-bit storage, P <= 64, the reset after the product
  // and an unscaled input; null otherwise.
  const void* w_ih;
  int32_t input;       // I
  int32_t tiles_of_8;  // a launch on tiles of 16 rows has at most so many of 8: forward16.cuh, `rows_of_block`
  // For instances that stream their weights (Tile16::kStreamed), W_hh as threads read it: [3, P / 8, 4 P, 2].
  const void* streamed;
  int32_t resident;  // how many of its three gates are kept in shared memory; set by the launcher
  float update;      // update_factor, the factor of the exponent in u
};

constexpr float update_factor(bool keep_side) { return keep_side ? kLog2E : -kLog2E; }

// The kernel writes the gate gradients and states, of which the host makes dx and dW by products over all steps. Steps
// that do not exist are not written.
struct Backward {
  Inputs in;
  const void* y;     // [y_rows, H], storage dtype
  const void* dy;    // like y; null: zero
  const void* dh_n;  // [batch, H], storage dtype; null: zero
  // Where weights are streamed (float32, P > 64): the words of W_hh and of its transpose in the order in which threads
  // take them, [2, 3, step of the product, P / 8 warps, 32 lanes, 2]; else null.
  const void* fragments;
  void* gates;   // [y_rows, G, P], storage dtype: dgh_n, da_r, da_u, da_n (G = 4); with the input scaled da_r, da_u,
                 // dgh_n and then gamma times da_r, da_u, da_n (6); with the reset before da_r, da_u, da_n (3)
  void* states;  // [y_rows, P], storage dtype: h before the step; with the reset before [y_rows, 2, P]: h and r h
  float* d_attention;  // like attention; null: none
  float* d_bias;       // [tiles, 4, P]: sums over the tile's rows and steps of da_r, da_u, da_n, dgh_n
  float* dh0;          // [batch, H]
};

struct SumRowsOfHistory {
  Rows rows;         // order and history are not read
  const void* from;  // [y_rows, width], storage dtype: its first `columns` columns are read
  void* to;          // [x_rows, columns], storage dtype; steps that do not exist are not written
  // The rows of history u, in row order, are rows_of_history[first[u] .. first[u + 1]): [batch] and [histories + 1].
  const int64_t *rows_of_history, *first;
  int32_t columns, width;  // even
};

}  // namespace dien::cuda
