// What the plans of attention and auxiliary loss share: kernels by dtype, and what an MLP costs.
#pragma once
#include "plan.h"

namespace dien {

constexpr int64_t kMostGroups = 16;

inline int64_t value_bytes(Store storage) { return storage == Store::f64 ? 8 : 4; }

inline const Kernels& mlp_kernels(Store storage) {
  const IsaKernels& isa = isa_kernels();
  return storage == Store::f64 ? isa.f64 : isa.wide;
}

// Of one token: values of its activations, twice, and multiplications, where the first layer reads `depth` values.
struct MlpCost {
  int64_t width, products;
};

// Throws std::bad_alloc where no memory could hold the layers.
inline MlpCost mlp_cost(const Mlp& mlp, int64_t depth) {
  MlpCost cost{0, 0};
  for (int64_t i = 0; i < mlp.count; ++i) {
    const Layer& l = mlp.layers[i];
    check_size(l.out, l.in);
    cost.width += 2 * l.out;
    cost.products += l.out * (i ? l.in : depth);
  }
  return cost;
}

}  // namespace dien
