// The instances of the forward for one storage dtype, one for each padded hidden size and number of rows in a tile.
// Each dtype has its own .cu file, so that they are compiled in parallel.
#pragma once
#include "forward8.cuh"
#include "instances.h"
#include "launch.h"
#include "run_forward.h"

namespace dien::cuda {

// S is the storage dtype. `forward8` exists for 16-bit storage only.
template <class S>
int forward_instance(const Forward& p, int padded, int rows, Stream stream) {
#define DIEN_CASE(P)                                                                     \
  case P:                                                                                \
    if constexpr (sizeof(typename S::Element) == 2) {                                    \
      if (rows == 8) return run(forward8<S, P>, Forward8<S, P>::kThreads, p, 8, stream); \
    } else if (rows == 8) {                                                              \
      return kInvalidValue;                                                              \
    }                                                                                    \
    return run_forward16<S, P>(p, stream);
  switch (padded) { DIEN_SIZES(DIEN_CASE) }
#undef DIEN_CASE
  return kInvalidValue;
}

}  // namespace dien::cuda
