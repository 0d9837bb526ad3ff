// Ops that ask the library about itself. Schemas are defined in dien_kernels/ops/__init__.py.
#include <torch/csrc/stable/library.h>

#include <string>

#include "../cpu/isa.h"

namespace {

std::string cpu_isa() { return dien::isa_name(); }

std::string set_cpu_isa(std::string name) {
  dien::set_isa(name);
  return dien::isa_name();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dien_kernels, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("_set_cpu_isa", TORCH_BOX(&set_cpu_isa));
}
