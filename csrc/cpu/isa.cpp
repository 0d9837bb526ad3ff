#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace dien {

extern const IsaKernels portable_kernels;
#ifndef DIEN_NO_X86
extern const IsaKernels avx2_kernels, avx2x2_kernels, avx512_kernels;
#endif

namespace {

struct Isa {
  const char* name;
  const IsaKernels* kernels;
  bool (*present)();
  bool automatic;
};

// Best first; avx2x2 exists for tests and is never chosen by itself.
const Isa kIsas[] = {
#ifndef DIEN_NO_X86
    {"avx512", &avx512_kernels,
     [] {
       return bool(__builtin_cpu_supports("avx512f")) && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
     },
     true},
    {"avx2", &avx2_kernels, [] { return bool(__builtin_cpu_supports("avx2")) && __builtin_cpu_supports("fma"); }, true},
    {"avx2x2", &avx2x2_kernels, [] { return bool(__builtin_cpu_supports("avx2")) && __builtin_cpu_supports("fma"); },
     false},
#endif
    {"portable", &portable_kernels, [] { return true; }, true},
};

std::atomic<const Isa*> g_isa{nullptr};

const Isa* find(const std::string& name) {
  for (const Isa& isa : kIsas) {
    if (name.empty() ? !isa.automatic : name != isa.name) continue;
    if (isa.present()) return &isa;
    if (!name.empty()) throw std::invalid_argument("DIEN_KERNELS_ISA: this machine lacks " + name);
  }
  throw std::invalid_argument("DIEN_KERNELS_ISA must be one of portable, avx2, avx2x2, avx512, got '" + name + "'");
}

const Isa& current() {
  const Isa* isa = g_isa.load();
  if (!isa) {
    const char* asked = std::getenv("DIEN_KERNELS_ISA");
    g_isa = isa = find(asked ? asked : "");
  }
  return *isa;
}

}  // namespace

const IsaKernels& isa_kernels() { return *current().kernels; }
std::string isa_name() { return current().name; }
void set_isa(const std::string& name) { g_isa = find(name); }

}  // namespace dien
