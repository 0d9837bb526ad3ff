#include "forward_instances.cuh"

namespace dien::cuda {

int forward_f32(const Forward& p, int padded, int rows, Stream stream) {
  return forward_instance<Float32>(p, padded, rows, stream);
}

}  // namespace dien::cuda
