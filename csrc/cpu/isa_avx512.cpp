// Kernels for AVX-512 (F, BW, DQ, VL): sixteen lanes, or eight with all thirty-two registers where sixteen would idle.
#include <cstddef>
#include <cstdint>

#include "isa.h"

#define DIEN_INLINE inline __attribute__((always_inline))
#define DIEN_NOINLINE __attribute__((noinline))
#define DIEN_TILE_ROWS 8

namespace dien::avx512 {
#include "kernels.h"
}  // namespace dien::avx512

namespace dien {
extern const IsaKernels avx512_kernels;
const IsaKernels avx512_kernels = {avx512::kernels_of<float, 16>(), avx512::kernels_of<float, 8>(),
                                   avx512::kernels_of<double, 8>()};
}  // namespace dien
