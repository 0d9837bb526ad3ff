// For shared histories: sums the gate gradients of the rows that read a history, for each of its steps, in row order.
#pragma once
#include "tile.cuh"

namespace dien::cuda {

// A thread sums a pair of columns of one step of a history. Block (u, s) takes the steps s, s + gridDim.y and so on of
// history u.
template <class S>
__global__ void __launch_bounds__(128) sum_rows_of_history(const SumRowsOfHistory p) {
  const int64_t history = blockIdx.x;
  int64_t x = 0, length;
  if (p.rows.offsets) {
    x = clamp(p.rows.offsets[history], 0, p.rows.x_rows);
    length = min(p.rows.offsets[history + 1] - x, p.rows.x_rows - x);
  } else {
    length = p.rows.lengths ? min(p.rows.lengths[history], p.rows.steps) : p.rows.steps;
    x = p.rows.time_major ? history : history * p.rows.steps;
  }
  const int64_t x_step = p.rows.time_major ? p.rows.histories : 1, y_step = p.rows.time_major ? p.rows.batch : 1;
  const int64_t first = p.first[history], end = p.first[history + 1];
  for (int64_t t = blockIdx.y; t < length; t += gridDim.y) {
    for (int column = 2 * threadIdx.x; column < p.columns; column += 2 * blockDim.x) {
      float sum[2] = {0, 0};
      for (int64_t at = first; at < end; ++at) {
        const int64_t row = p.rows_of_history[at];
        const int64_t y = p.rows.offsets ? p.rows.y_start[row] : p.rows.time_major ? row : row * p.rows.steps;
        if (p.rows.offsets && y + t >= p.rows.y_rows) continue;
        const auto* from = static_cast<const typename S::Element*>(p.from) + (y + t * y_step) * p.width + column;
        const float2 pair = S::widen_pair(*reinterpret_cast<const typename S::Pair*>(from));
        sum[0] += pair.x, sum[1] += pair.y;
      }
      auto* to = static_cast<typename S::Element*>(p.to) + (x + t * x_step) * p.columns + column;
      *reinterpret_cast<typename S::Pair*>(to) = S::round_pair(sum[0], sum[1]);
    }
  }
}

}  // namespace dien::cuda
