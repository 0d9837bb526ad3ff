// The instruction sets the CPU kernels are compiled for, and the one in force.
#pragma once
#include <string>

#include "params.h"
#include "unit_params.h"

namespace dien {

// One set of kernels, for one compute dtype and lane count.
struct Kernels {
  int64_t lanes;
  Sizes (*sizes)(const Job&, bool backward);
  void (*forward)(const Job&);
  void (*backward)(const Job&);
  void (*lay_out_attention)(AttentionJob&);
  void (*attention)(const AttentionJob&);
  void (*lay_out_auxiliary)(AuxiliaryJob&);
  void (*auxiliary)(const AuxiliaryJob&);
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
