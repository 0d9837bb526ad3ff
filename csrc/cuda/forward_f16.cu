// The forward's instances for one storage dtype.
#include "forward16.cuh"
#include "forward8.cuh"
#include "instances.h"
#include "launch.h"
#include "run.h"

namespace dien::cuda {

int forward_f16(const Forward& p, int padded, int rows, Stream stream) {
#define DIEN_CASE(P)                                                                               \
  case P:                                                                                          \
    if (rows == 8) return run(forward8<Float16, P>, Forward8<Float16, P>::kThreads, p, 8, stream); \
    return run(forward16<Float16, P>, Tile16<Float16, P>::kThreads, p, 16, stream);
  switch (padded) { DIEN_FORWARD_NARROW(DIEN_CASE) }
#undef DIEN_CASE
  return kInvalidValue;
}

}  // namespace dien::cuda
