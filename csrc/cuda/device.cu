// Error messages and versions of CUDA.
#include "launch.h"

namespace dien::cuda {

static_assert(int(kInvalidValue) == cudaErrorInvalidValue);
static_assert(int(kNoKernelImage) == cudaErrorNoKernelImageForDevice);

const char* words_of(int error) { return cudaGetErrorString(cudaError_t(error)); }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace dien::cuda
