// Kernels for AVX2 with FMA: eight lanes; and sixteen on pairs of registers, so that the 16-lane template runs in tests
// on machines without AVX-512.
#include <cstddef>
#include <cstdint>

#include "isa.h"

#define DIEN_INLINE inline __attribute__((always_inline))
#define DIEN_NOINLINE __attribute__((noinline))
#define DIEN_TILE_ROWS 4

namespace dien::avx2 {
#include "kernels.h"
}  // namespace dien::avx2

namespace dien {
extern const IsaKernels avx2_kernels, avx2x2_kernels;
const IsaKernels avx2_kernels = {avx2::kernels_of<float, 8>(), {}, avx2::kernels_of<double, 4>()};
const IsaKernels avx2x2_kernels = {avx2::kernels_of<float, 16>(), {}, avx2::kernels_of<double, 8>()};
}  // namespace dien
