// Launchers: each takes parameters, the padded size of an instance (instances.h) and a stream, and returns the launch's
// error, 0 for none. Nothing waits for the device. No header of CUDA's is needed to call them.
#pragma once
#include "params.h"

struct CUstream_st;

namespace dien::cuda {

using Stream = CUstream_st*;
enum Error : int { kNone = 0, kInvalidValue = 1, kNoKernelImage = 209 };  // error numbers of CUDA that are used here

// Tiles of `rows` (16 or 8) rows; an instance that does not exist is kInvalidValue.
int forward_bf16(const Forward& p, int padded, int rows, Stream stream);
int forward_f16(const Forward& p, int padded, int rows, Stream stream);
int forward_f32(const Forward& p, int padded, int rows, Stream stream);
int backward_bf16(const Backward& p, int padded, Stream stream);
int backward_f16(const Backward& p, int padded, Stream stream);
int backward_f32(const Backward& p, int padded, Stream stream);
int sum_rows_of_history(const SumRowsOfHistory& p, Store store, Stream stream);

const char* words_of(int error);

// CUDA versions as 1000 * major + 10 * minor: of the driver (0: none) and of the runtime inside. They need no GPU.
int driver_version();
int runtime_version();

}  // namespace dien::cuda
