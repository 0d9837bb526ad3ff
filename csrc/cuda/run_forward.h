// Launches the forward on tiles of 16 rows.
#pragma once
#include <algorithm>

#include "forward16.cuh"
#include "run.h"

namespace dien::cuda {

// The most shared memory that a block of the current device may ask for.
inline int shared_memory_of_block(int& bytes) {
  int device = 0;
  if (cudaGetDevice(&device) == cudaSuccess)
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return cudaGetLastError();  // reading the error also clears it
}

template <class S, int Padded>
int run_forward16(Forward p, Stream stream) {
  using Tile = Tile16<S, Padded>;
  using Kernel = Forward16<S, Padded>;
  if (p.w_ih && !(Kernel::kFuses && p.input <= Padded)) return kInvalidValue;
  int dynamic = 0;
  if constexpr (Tile::kStreamed) {
    int most = 0;
    if (const int error = shared_memory_of_block(most)) return error;
    constexpr int kGate = Tile::kGateFragments * int(sizeof(uint2));
    p.resident = std::clamp((most - int(sizeof(typename Kernel::Shared))) / kGate, 0, 3);
    dynamic = p.resident * kGate;
  }
  const int64_t more =
      std::min<int64_t>((p.tiles_of_8 + 1) / 2, (p.in.rows.batch + 15) / 16);  // two tiles of 8 replace one of 16
  return run(forward16<S, Padded>, Tile::kThreads, p, 16, stream, dynamic, more);
}

}  // namespace dien::cuda
