// The forward's instances for one storage dtype.
#include "instances.h"
#include "launch.h"
#include "run_forward.h"

namespace dien::cuda {

int forward_f32(const Forward& p, int padded, int rows, Stream stream) {
#define DIEN_CASE(P) \
  case P:            \
    return rows == 8 ? kInvalidValue : run_forward16<Float32, P>(p, stream);
  switch (padded) { DIEN_SIZES(DIEN_CASE) }
#undef DIEN_CASE
  return kInvalidValue;
}

}  // namespace dien::cuda
