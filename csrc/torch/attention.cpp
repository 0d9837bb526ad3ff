// The attention scores' raw ops for CPU tensors. Sizes and dtypes were checked by dien_kernels/ops/attention/op.py; values
// are checked by cpu/attention.cpp.
#include "../cpu/attention.h"

#include <torch/csrc/stable/library.h>

#include <cstring>

#include "tensors.h"

namespace {

using namespace dien::bound;
using Tensors = std::vector<Tensor>;

dien::AttentionCall make_call(const Tensor& target, const Tensor& states, const Layers& layers, const Maybe& offsets,
                              bool bilinear, double scale, bool softmax) {
  dien::AttentionCall call{};
  call.batch = target.size(0);
  call.histories = offsets ? offsets->size(0) - 1 : states.size(0);
  call.size = target.size(1);
  call.hidden = states.size(states.dim() - 1);
  call.bilinear = bilinear;
  call.softmax = softmax;
  call.scale = scale;
  call.target = array_of(target, 0);
  call.states = array_of(states, offsets ? 1 : 0);
  call.mlp = layers.mlp;
  call.threads = threads();
  return call;
}

// The layout of a call, checked.
dien::Layout layout_of(const Tensor& target, const Tensor& states, const Maybe& lengths, const Maybe& offsets,
                       const Maybe& history, int64_t rows_total, Indices& indices) {
  const dien::Layout layout{
      indices.read(lengths), indices.read(offsets), indices.read(history), states.size(0), rows_total, false};
  const int64_t histories = offsets ? offsets->size(0) - 1 : states.size(0);
  dien::check_attention(layout, histories, offsets ? 0 : states.size(1), target.size(0));
  return layout;
}

void run(const dien::AttentionCall& call, const dien::Layout& layout, const Tensor& states, const Maybe& mask) {
  dien::Mask of{};
  if (mask) of = {static_cast<const bool*>(mask->const_data_ptr()), mask->stride(0), mask->stride(1)};
  dien::attention(call, layout, of, layout.offsets ? 0 : states.size(1));
}

Tensor forward(Tensor target, Tensor states, Tensors weights, Tensors biases, Tensors slopes, Maybe lengths,
               Maybe offsets, Maybe mask, Maybe history, int64_t rows_total, bool bilinear, int64_t activation,
               double scale, bool softmax) {
  Layers layers(weights, biases, slopes, activation);
  Indices indices;
  const dien::Layout layout = layout_of(target, states, lengths, offsets, history, rows_total, indices);
  dien::AttentionCall call = make_call(target, states, layers, offsets, bilinear, scale, softmax);
  const ScalarType compute = compute_type(states.scalar_type());
  Tensor scores = !offsets  ? new_tensor({call.batch, states.size(1)}, compute)
                  : history ? new_tensor({rows_total}, compute)
                            : new_tensor({states.size(0)}, compute);
  call.scores = scores.mutable_data_ptr();
  if (scores.numel() > 0) std::memset(call.scores, 0, scores.numel() * scores.element_size());
  run(call, layout, states, mask);
  return scores;
}

Tensors backward(Tensor dscores, Tensor target, Tensor states, Tensors weights, Tensors biases, Tensors slopes,
                 Maybe lengths, Maybe offsets, Maybe mask, Maybe history, Tensor scores, int64_t rows_total,
                 bool bilinear, int64_t activation, double scale, bool softmax) {
  const ScalarType storage = states.scalar_type();
  Layers layers(weights, biases, slopes, activation);
  Indices indices;
  const dien::Layout layout = layout_of(target, states, lengths, offsets, history, rows_total, indices);
  Tensors results{new_like(target, storage), large(new_like(states, storage))};
  layers.add_results(weights, biases, slopes, storage, results);
  dien::AttentionCall call = make_call(target, states, layers, offsets, bilinear, scale, softmax);
  call.backward = true;
  call.da = array_of(dscores, offsets ? 1 : 0);
  call.scores = const_cast<void*>(scores.const_data_ptr());
  call.dtarget = results[0].mutable_data_ptr();
  call.dstates = results[1].mutable_data_ptr();
  run(call, layout, states, mask);
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dien_kernels, CPU, m) {
  m.impl("_attention_cpu_fwd", TORCH_BOX(&forward));
  m.impl("_attention_cpu_bwd", TORCH_BOX(&backward));
}
