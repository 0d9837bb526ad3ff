#include "forward_instances.cuh"

namespace dien::cuda {

int forward_f16(const Forward& p, int padded, int rows, Stream stream) {
  return forward_instance<Float16>(p, padded, rows, stream);
}

}  // namespace dien::cuda
