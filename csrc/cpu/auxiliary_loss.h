// The auxiliary loss on the CPU as its callers see it: raw pointers in, raw pointers out.
#pragma once
#include "auxiliary_loss_params.h"
#include "layout.h"

namespace dien {

// In the order of NORMALIZERS in dien_kernels/ops/auxiliary_loss/contract.py.
enum class Normalizer : int { joint, separate, padded, row };

// The caller fills the call's sizes, options, arrays, layers, results and threads. Array strides: s0 row, s1 step, s2
// feature (jagged: s1, s2). Returns the loss, summed in double. Throws std::invalid_argument for index values that would
// leave the arrays.
double auxiliary_loss(AuxiliaryLossCall call, const Layout& layout, int64_t batch, int64_t steps,
                      Normalizer normalizer);

}  // namespace dien
