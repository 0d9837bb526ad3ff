// The backward's instances for one storage dtype.
#include "backward16.cuh"
#include "instances.h"
#include "launch.h"
#include "run.h"

namespace dien::cuda {

int backward_f32(const Backward& p, int padded, Stream stream) {
#define DIEN_CASE(P) \
  case P:            \
    return run(backward16<Float32, P>, Tile16<Float32, P>::kThreads, p, 16, stream, Backward16<Float32, P>::kDynamic);
  switch (padded) { DIEN_SIZES(DIEN_CASE) }
#undef DIEN_CASE
  return kInvalidValue;
}

}  // namespace dien::cuda
