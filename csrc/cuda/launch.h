// Launchers: each takes parameters, the padded size of an instance (instances.h) and a stream, and returns the launch's
// error. Nothing waits for the device.
#pragma once
#include <cuda_runtime_api.h>

#include "params.h"

namespace dien::cuda {

// Tiles of `rows` (16 or 8) rows; an instance that does not exist is cudaErrorInvalidValue.
cudaError_t forward_bf16(const Forward& p, int padded, int rows, cudaStream_t stream);
cudaError_t forward_f16(const Forward& p, int padded, int rows, cudaStream_t stream);
cudaError_t forward_f32(const Forward& p, int padded, int rows, cudaStream_t stream);
cudaError_t backward_bf16(const Backward& p, int padded, cudaStream_t stream);
cudaError_t backward_f16(const Backward& p, int padded, cudaStream_t stream);
cudaError_t backward_f32(const Backward& p, int padded, cudaStream_t stream);
cudaError_t sum_readers(const SumReaders& p, Store store, cudaStream_t stream);

}  // namespace dien::cuda
