// One launch of a kernel on tiles of `rows` rows.
#pragma once
#include "launch.h"

namespace dien::cuda {

template <class Params>
int run(void (*kernel)(Params), int threads, const Params& p, int rows, Stream stream) {
  const unsigned tiles = unsigned((p.in.rows.batch + rows - 1) / rows);
  kernel<<<tiles, threads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace dien::cuda
