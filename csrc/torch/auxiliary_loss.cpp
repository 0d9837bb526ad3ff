// The auxiliary loss's raw ops for CPU tensors. Sizes and dtypes were checked by
// dien_kernels/ops/auxiliary_loss/op.py; values are checked by cpu/auxiliary_loss.cpp.
#include "../cpu/auxiliary_loss.h"

#include <torch/csrc/stable/library.h>

#include "tensors.h"

namespace {

using namespace dien::bound;
using Tensors = std::vector<Tensor>;

// The loss, and in `results`, unless null, every gradient behind it.
Tensor run(const Tensor& states, const Tensor& positive, const Tensor& negative, const Tensors& weights,
           const Tensors& biases, const Tensors& slopes, const Maybe& lengths, const Maybe& offsets, bool inner,
           int64_t activation, int64_t normalizer, double eps, int64_t ahead, Tensors* results) {
  Layers layers(weights, biases, slopes, activation);
  dien::AuxiliaryLossCall call{};
  const int64_t rows = states.dim() - 1, from = offsets ? 1 : 0;  // from: the first stride's place
  const ScalarType compute = compute_type(states.scalar_type());
  call.hidden = states.size(rows);
  call.size = positive.size(rows);
  call.negatives = negative.size(rows);
  call.inner = inner;
  call.eps = eps;
  call.ahead = ahead;
  call.states = array_of(states, from);
  call.positive = array_of(positive, from);
  call.negative = {const_cast<void*>(negative.const_data_ptr()), offsets ? 0 : negative.stride(0),
                   negative.stride(rows - 1), negative.stride(rows + 1), store_of(negative.scalar_type())};
  call.negative_each = negative.stride(rows);
  call.threads = threads();
  call.backward = results;
  if (results) {
    for (const Tensor* t : {&states, &positive, &negative}) results->push_back(large(new_like(*t, compute)));
    call.dstates = (*results)[0].mutable_data_ptr();
    call.dpositive = (*results)[1].mutable_data_ptr();
    call.dnegative = (*results)[2].mutable_data_ptr();
    layers.add_results(weights, biases, slopes, compute, *results);
  }
  call.mlp = layers.mlp;
  Indices indices;
  const dien::Layout layout{indices.read(lengths), indices.read(offsets), nullptr, states.size(0), -1, false};
  const int64_t batch = offsets ? offsets->size(0) - 1 : states.size(0), steps = offsets ? 0 : states.size(1);
  const double value = dien::auxiliary_loss(call, layout, batch, steps, dien::Normalizer(normalizer));
  Tensor loss = new_tensor({}, compute);
  if (compute == ScalarType::Double)
    *static_cast<double*>(loss.mutable_data_ptr()) = value;
  else
    *static_cast<float*>(loss.mutable_data_ptr()) = float(value);
  return loss;
}

Tensor forward(Tensor states, Tensor positive, Tensor negative, Tensors weights, Tensors biases, Tensors slopes,
               Maybe lengths, Maybe offsets, bool inner, int64_t activation, int64_t normalizer, double eps,
               int64_t ahead) {
  return run(states, positive, negative, weights, biases, slopes, lengths, offsets, inner, activation, normalizer, eps,
             ahead, nullptr);
}

Tensors forward_backward(Tensor states, Tensor positive, Tensor negative, Tensors weights, Tensors biases,
                         Tensors slopes, Maybe lengths, Maybe offsets, bool inner, int64_t activation,
                         int64_t normalizer, double eps, int64_t ahead) {
  Tensors results;
  Tensor loss = run(states, positive, negative, weights, biases, slopes, lengths, offsets, inner, activation,
                    normalizer, eps, ahead, &results);
  results.insert(results.begin(), loss);
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dien_kernels, CPU, m) {
  m.impl("_auxiliary_loss_cpu_fwd", TORCH_BOX(&forward));
  m.impl("_auxiliary_loss_cpu_fwd_bwd", TORCH_BOX(&forward_backward));
}
