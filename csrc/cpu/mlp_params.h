// The multilayer perceptron of attention and auxiliary loss as its kernels are told of it.
#pragma once
#include "params.h"

namespace dien {

// In the order of ACTIVATIONS in dien_kernels/ops/_mlp.py.
enum class Activation : int { sigmoid, relu, prelu, none };

struct Layer {
  int64_t in, out;
  Array weight, bias, slope;       // [out][in]; [out] or absent; [out], or [1] where `one_slope`, or absent
  void *dweight, *dbias, *dslope;  // results, contiguous; the last two in the compute dtype
  bool one_slope;
};

struct Mlp {
  const Layer* layers;
  int64_t count;
  Activation activation;
  Store gradients;  // dtype of dweight
};

}  // namespace dien
