#include "backward_instances.cuh"

namespace dien::cuda {

int backward_f16(const Backward& p, int padded, Stream stream) { return backward_instance<Float16>(p, padded, stream); }

}  // namespace dien::cuda
