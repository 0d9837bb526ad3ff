// The instruction sets the CPU kernels are compiled for, and the one in force.
#pragma once
#include <string>

#include "attention_params.h"
#include "auxiliary_loss_params.h"
#include "recurrence_params.h"

namespace dien {

// One op: what it asks of a call's working memory, and the op itself.
template <class Call>
struct Kernel {
  Sizes (*sizes)(const Call&);
  void (*run)(const Call&);
};

// One set of kernels, for one compute dtype and lane count.
struct Kernels {
  int64_t lanes;
  Kernel<RecurrenceCall> recurrence;
  Kernel<AttentionCall> attention;
  Kernel<AuxiliaryLossCall> auxiliary_loss;
};

// Kernels of one instruction set. `narrow` has half the lanes of `wide`, for sizes that would leave many idle;
// its `lanes` is 0 where there is none.
struct IsaKernels {
  Kernels wide, narrow, f64;
};

// The instruction set in force: DIEN_KERNELS_ISA at first use, else the best this machine has.
const IsaKernels& isa_kernels();
std::string isa_name();

// Forces portable, avx2, avx2x2 (the 16-lane kernels on pairs of AVX2 registers) or avx512, or "" for the best one.
// Throws std::invalid_argument for a name that is unknown or that this machine lacks.
void set_isa(const std::string& name);

}  // namespace dien
