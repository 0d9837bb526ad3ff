// Kernels for any machine: four lanes, which x86-64 and AArch64 have without asking.
#include <cstddef>
#include <cstdint>

#include "isa.h"

#define DIEN_INLINE inline __attribute__((always_inline))
#define DIEN_NOINLINE __attribute__((noinline))
#define DIEN_TILE_ROWS 4

namespace dien::portable {
#include "kernels.h"
}  // namespace dien::portable

namespace dien {
extern const IsaKernels portable_kernels;
const IsaKernels portable_kernels = {portable::kernels_of<float, 4>(), {}, portable::kernels_of<double, 2>()};
}  // namespace dien
