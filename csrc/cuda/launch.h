// The launchers of the kernels. Each takes parameters and a stream, and returns the error of the launch, 0 for none.
// `padded` is the padded size of an instance (instances.h). No launcher waits for the device, and callers need no CUDA
// header.
#pragma once
#include "params.h"

struct CUstream_st;

namespace dien::cuda {

using Stream = CUstream_st*;
enum Error : int { kNone = 0, kInvalidValue = 1, kNoKernelImage = 209 };  // error numbers of CUDA that are used here

// The forward runs on tiles of `rows` rows, 16 or 8. For an instance that does not exist, the error is kInvalidValue.
int forward_bf16(const Forward& p, int padded, int rows, Stream stream);
int forward_f16(const Forward& p, int padded, int rows, Stream stream);
int forward_f32(const Forward& p, int padded, int rows, Stream stream);
int backward_bf16(const Backward& p, int padded, Stream stream);
int backward_f16(const Backward& p, int padded, Stream stream);
int backward_f32(const Backward& p, int padded, Stream stream);
int sum_rows_of_history(const SumRowsOfHistory& p, Store store, Stream stream);

const char* words_of(int error);

// The CUDA versions of the driver (0 if there is none) and of the runtime in the library, as 1000 * major + 10 * minor.
// These two functions need no GPU.
int driver_version();
int runtime_version();

}  // namespace dien::cuda
