#include "backward_instances.cuh"

namespace dien::cuda {

int backward_bf16(const Backward& p, int padded, Stream stream) {
  return backward_instance<BFloat16>(p, padded, stream);
}

}  // namespace dien::cuda
