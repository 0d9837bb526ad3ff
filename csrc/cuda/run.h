// Launch a kernel with one block for each tile of `rows` rows and `more` blocks in addition, each with `dynamic` bytes
// of dynamic shared memory.
#pragma once
#include "launch.h"

namespace dien::cuda {

template <class Params>
int run(void (*kernel)(Params), int threads, const Params& p, int rows, Stream stream, int dynamic = 0,
        int64_t more = 0) {
  if (dynamic > 0) {  // a kernel that uses more than 48 KB of shared memory must ask for it
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic);
    if (const cudaError_t error = cudaGetLastError()) return error;  // reading the error also clears it
  }
  const unsigned tiles = unsigned((p.in.rows.batch + rows - 1) / rows + more);
  kernel<<<tiles, threads, dynamic, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace dien::cuda
