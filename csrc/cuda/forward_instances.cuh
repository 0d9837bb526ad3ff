// The forward's instances for one storage dtype, by padded hidden size and rows of a tile. Each dtype has a file of its
// own, so that they are compiled side by side.
#pragma once
#include "forward8.cuh"
#include "instances.h"
#include "launch.h"
#include "run_forward.h"

namespace dien::cuda {

// S: the storage dtype. Tiles of 8 rows exist for 16-bit storage alone.
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
