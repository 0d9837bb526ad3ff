// Launches the sums over the rows of a history, for every storage dtype.
#include "launch.h"
#include "sum_rows_of_history.cuh"

#include <algorithm>

namespace dien::cuda {

int sum_rows_of_history(const SumRowsOfHistory& p, Store store, Stream stream) {
  // The host does not know the length of a jagged history; 64 blocks stride over its steps.
  const int64_t steps = p.rows.offsets ? 64 : std::clamp<int64_t>(p.rows.steps, 1, 65535);
  const dim3 grid(unsigned(p.rows.histories), unsigned(steps));
  if (store == Store::bf16) sum_rows_of_history<BFloat16><<<grid, 128, 0, stream>>>(p);
  if (store == Store::f16) sum_rows_of_history<Float16><<<grid, 128, 0, stream>>>(p);
  if (store == Store::f32) sum_rows_of_history<Float32><<<grid, 128, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace dien::cuda
