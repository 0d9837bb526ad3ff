// One launch of a kernel on tiles of `rows` rows.
#pragma once
#include "params.h"

namespace dien::cuda {

template <class Params>
cudaError_t run(void (*kernel)(Params), int threads, const Params& p, int rows, cudaStream_t stream) {
  const unsigned tiles = unsigned((p.in.rows.batch + rows - 1) / rows);
  kernel<<<tiles, threads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace dien::cuda
