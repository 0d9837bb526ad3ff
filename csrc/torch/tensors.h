// torch's stable ABI as the bindings use it: tensors in as arrays, results out, index tensors as pointers.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/memory.h"
#include "../cpu/mlp_params.h"

namespace dien::bound {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

inline Store store_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Store::f32;
    case ScalarType::Double:
      return Store::f64;
    case ScalarType::BFloat16:
      return Store::bf16;
    default:
      throw std::invalid_argument("dtype must be float32, float64 or bfloat16 for the CPU kernels");
  }
}

inline int32_t code_of(ScalarType type) {
  return type == ScalarType::Float    ? aoti_torch_dtype_float32()
         : type == ScalarType::Double ? aoti_torch_dtype_float64()
                                      : aoti_torch_dtype_bfloat16();
}

inline ScalarType compute_type(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

// The innermost strides go to the places named by the layouts in cpu/*.h: `from` is the first stride's place.
inline Array array_of(const Tensor& t, int from, bool swap = false) {
  int64_t s[3] = {0, 0, 0};
  for (int64_t i = 0; i < t.dim(); ++i) s[from + i] = t.stride(i);
  if (swap) std::swap(s[0], s[1]);
  return {const_cast<void*>(t.const_data_ptr()), s[0], s[1], s[2], store_of(t.scalar_type())};
}

inline Array array_of(const Maybe& t, int from, bool swap = false) { return t ? array_of(*t, from, swap) : Array{}; }

// Contiguous and uninitialised. By the C shim itself: torch::stable::empty goes through the dispatcher, for microseconds.
template <class Sizes>
Tensor new_tensor(const Sizes& sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(std::data(sizes)[i], 1)) strides[i] = stride;
  AtenTensorHandle handle;
  const auto error = aoti_torch_empty_strided(int64_t(sizes.size()), std::data(sizes), strides.data(), code_of(type),
                                              aoti_torch_device_type_cpu(), -1, &handle);
  if (error) {  // the shim keeps no words
    std::string shape;
    for (size_t i = 0; i < sizes.size(); ++i) shape += (i ? ", " : "") + std::to_string(std::data(sizes)[i]);
    throw std::runtime_error("cannot allocate a result of shape [" + shape + "]: out of memory");
  }
  return Tensor(handle);
}

inline Tensor new_tensor(std::initializer_list<int64_t> sizes, ScalarType type) {
  return new_tensor<std::initializer_list<int64_t>>(sizes, type);
}

// A result whose size grows with the batch.
inline Tensor large(Tensor t) {
  prefer_huge_pages(t.mutable_data_ptr(), t.numel() * int64_t(t.element_size()));
  return t;
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes(t.dim());
  for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = t.size(int64_t(i));
  return sizes;
}

inline Tensor new_like(const Tensor& t, ScalarType type) { return new_tensor(sizes_of(t), type); }

// Index tensors may be slices of others; the kernels read them as contiguous. The ops have checked their dtype and rank,
// but a wrong one would make the kernels read foreign memory, so it is asked once more.
class Indices {
 public:
  const int64_t* read(const Maybe& t) {
    if (!t) return nullptr;
    if (t->scalar_type() != ScalarType::Long || t->dim() != 1)
      throw std::invalid_argument("index tensors must have dtype int64 and one dimension");
    const auto* p = static_cast<const int64_t*>(t->const_data_ptr());
    const int64_t n = t->size(0), step = t->stride(0);
    if (step == 1) return p;
    auto& copy = copies_.emplace_back(n);
    for (int64_t i = 0; i < n; ++i) copy[i] = p[i * step];
    return copy.data();
  }

 private:
  std::vector<std::vector<int64_t>> copies_;
};

// The layers of an MLP, and where their gradients go: results are appended, and pointed to, in schema order.
struct Layers {
  std::vector<Layer> layers;
  Mlp mlp;

  Layers(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, const std::vector<Tensor>& slopes,
         int64_t activation)
      : layers(weights.size()) {
    for (size_t i = 0; i < layers.size(); ++i) {
      Layer& l = layers[i];
      l = {};
      l.out = weights[i].size(0);
      l.in = weights[i].size(1);
      l.weight = array_of(weights[i], 0);
      if (!biases.empty() && biases[i].numel() > 0) l.bias = array_of(biases[i], 0);
      if (i < slopes.size()) {
        l.slope = array_of(slopes[i], 0);
        l.one_slope = slopes[i].numel() == 1;
      }
    }
    mlp = {layers.data(), int64_t(layers.size()), Activation(activation), Store::f32};
  }

  void add_results(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                   const std::vector<Tensor>& slopes, ScalarType weight_type, std::vector<Tensor>& results) {
    const auto add = [&](const Tensor& like, ScalarType type) {
      results.push_back(new_like(like, type));
      return results.back().mutable_data_ptr();
    };
    mlp.gradients = store_of(weight_type);
    for (size_t i = 0; i < weights.size(); ++i) layers[i].dweight = add(weights[i], weight_type);
    for (size_t i = 0; i < biases.size(); ++i) {
      void* data = add(biases[i], compute_type(weight_type));
      layers[i].dbias = biases[i].numel() > 0 ? data : nullptr;
    }
    for (size_t i = 0; i < slopes.size(); ++i) layers[i].dslope = add(slopes[i], compute_type(weight_type));
  }
};

inline Threads threads() {
  return {int(torch::stable::get_num_threads()), [](int64_t tasks, void* context, void (*task)(void*, int64_t)) {
            torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) task(context, i);
            });
          }};
}

}  // namespace dien::bound
