// The instances of the backward for one storage dtype, one for each padded hidden size. Each dtype has its own .cu
// file, so that they are compiled in parallel.
#pragma once
#include "backward16.cuh"
#include "instances.h"
#include "launch.h"
#include "run.h"

namespace dien::cuda {

template <class S>
int backward_instance(const Backward& p, int padded, Stream stream) {
#define DIEN_CASE(P) \
  case P:            \
    return run(backward16<S, P>, Tile16<S, P>::kThreads, p, 16, stream, Backward16<S, P>::kDynamic);
  switch (padded) { DIEN_SIZES(DIEN_CASE) }
#undef DIEN_CASE
  return kInvalidValue;
}

}  // namespace dien::cuda
