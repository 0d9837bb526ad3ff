// One launch of a kernel on tiles of `rows` rows, with `dynamic` bytes of shared memory beside its own and `more`
// tiles.
#pragma once
#include "launch.h"

namespace dien::cuda {

template <class Params>
int run(void (*kernel)(Params), int threads, const Params& p, int rows, Stream stream, int dynamic = 0,
        int64_t more = 0) {
  if (dynamic > 0) {  // above 48 KB in all, a kernel must ask for it
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic);
    if (const cudaError_t error = cudaGetLastError()) return error;  // reading the error also clears it
  }
  const unsigned tiles = unsigned((p.in.rows.batch + rows - 1) / rows + more);
  kernel<<<tiles, threads, dynamic, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace dien::cuda
