// The forward's instances for one storage dtype.
#include "forward8.cuh"
#include "instances.h"
#include "launch.h"
#include "run_forward.h"

namespace dien::cuda {

int forward_f16(const Forward& p, int padded, int rows, Stream stream) {
#define DIEN_CASE(P)                                                                               \
  case P:                                                                                          \
    if (rows == 8) return run(forward8<Float16, P>, Forward8<Float16, P>::kThreads, p, 8, stream); \
    return run_forward16<Float16, P>(p, stream);
  switch (padded) { DIEN_SIZES(DIEN_CASE) }
#undef DIEN_CASE
  return kInvalidValue;
}

}  // namespace dien::cuda
