#include "backward_instances.cuh"

namespace dien::cuda {

int backward_f32(const Backward& p, int padded, Stream stream) { return backward_instance<Float32>(p, padded, stream); }

}  // namespace dien::cuda
