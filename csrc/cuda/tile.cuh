// The common parts of the kernels: storage dtypes and their matrix instruction, activations, and rows of the batch.
//
// Matrix fragments are addressed in bytes, so that 16-bit dtypes and TF32 share their code. One step of a product takes
// 32 bytes of each row (16 or 8 values), and lane 4 g + q of a warp (group g, place q) holds the words at bytes 4q and
// 16 + 4q of it.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "params.h"

namespace dien::cuda {

#define DIEN_INLINE __device__ __forceinline__
#include "../cell.h"
#undef DIEN_INLINE

__device__ __forceinline__ uint32_t bits_of(float v) { return __float_as_uint(v); }

// 1 / (1 + 2^x) without a division. 2^x may be inf, whose reciprocal is 0; NaN gives NaN.
__device__ __forceinline__ float logistic2(float x) {
  float power, result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1.f + power));
  return result;
}

__device__ __forceinline__ float tanh_of(float x) { return fmaf(2.f, logistic2(-2.f * kLog2E * x), -1.f); }

// Near 0 the subtraction in tanh_of loses most digits of float32; there a least-squares fit replaces it, with an error
// of 4e-8.
__device__ __forceinline__ float exact_tanh_of(float x) {
  const float s = x * x;
  const float p = fmaf(fmaf(fmaf(0.01643201f, s, -0.05266803f), s, 0.13320643f), s, -0.33332941f);
  return s < 0.3f ? fmaf(x * s, p, x) : tanh_of(x);
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

template <size_t N>
__device__ __forceinline__ void load_matrix_x2(uint32_t (&r)[N], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_matrix_x2_transposed(uint32_t (&r)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}

#define DIEN_MMA(SHAPE, TYPES, C, A, B0, B1)                                \
  asm volatile("mma.sync.aligned." SHAPE ".row.col.f32." TYPES              \
               ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
               : "+f"(C[0]), "+f"(C[1]), "+f"(C[2]), "+f"(C[3])             \
               : "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3]), "r"(B0), "r"(B1))

// A storage dtype of 16 bits; two neighbouring values are handled as one word.
template <class T>
struct Narrow {
  using Element = T;
  using Pair = uint32_t;
  static constexpr int kParts = 1;  // how many parts an operand of a product is split into

  static __device__ __forceinline__ float widen(T v) { return float(v); }
  static __device__ __forceinline__ float tanh(float x) { return tanh_of(x); }
  static __device__ __forceinline__ T round(float v) { return T(v); }
  static __device__ __forceinline__ void split(uint32_t (&parts)[1], uint32_t word) { parts[0] = word; }
};

struct BFloat16 : Narrow<__nv_bfloat16> {
  static __device__ __forceinline__ float2 widen_pair(uint32_t v) {
    return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
  }
  static __device__ __forceinline__ uint32_t round_pair(float a, float b) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    DIEN_MMA("m16n8k16", "bf16.bf16", c, a, b0, b1);
  }
};

struct Float16 : Narrow<__half> {
  static __device__ __forceinline__ float2 widen_pair(uint32_t v) {
    return __half22float2(*reinterpret_cast<const __half2*>(&v));
  }
  static __device__ __forceinline__ uint32_t round_pair(float a, float b) {
    const __half2 v = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    DIEN_MMA("m16n8k16", "f16.f16", c, a, b0, b1);
  }
};

// float32 on TF32 tensor cores, with the accuracy of float32. An operand is split into two TF32 numbers, whose sum has
// a relative error of at most 2^-22. The product of the two low parts, less than 2^-20 of the whole, is left out.
struct Float32 {
  using Element = float;
  using Pair = float2;
  static constexpr int kParts = 2;

  static __device__ __forceinline__ float widen(float v) { return v; }
  static __device__ __forceinline__ float tanh(float x) { return exact_tanh_of(x); }
  static __device__ __forceinline__ float round(float v) { return v; }
  static __device__ __forceinline__ float2 widen_pair(float2 v) { return v; }
  static __device__ __forceinline__ float2 round_pair(float a, float b) { return make_float2(a, b); }
  // The high part is truncated: mma ignores the last 13 bits. Adding half of the last kept bit rounds the low part.
  static __device__ __forceinline__ void split(uint32_t (&parts)[2], uint32_t word) {
    parts[0] = word & 0xffffe000u;
    parts[1] = bits_of(__uint_as_float(word) - __uint_as_float(parts[0])) + 0x1000u;
  }
  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    DIEN_MMA("m16n8k8", "tf32.tf32", c, a, b0, b1);
  }
};

// Fill shared memory with zeros, because products read past a row's units, where nothing else writes.
template <class Shared>
__device__ __forceinline__ void clear(Shared& shared) {
  uint32_t* words = reinterpret_cast<uint32_t*>(&shared);
  for (int i = threadIdx.x; i < int(sizeof(Shared) / 4); i += blockDim.x) words[i] = 0;
  __syncthreads();
}

// One row of the batch: its index in h0 and h_n, its length, and the flat rows of x, y and attention of its step 0.
struct Row {
  int64_t index, x, y, attention;
  int length;
};

__device__ __forceinline__ int64_t clamp(int64_t v, int64_t low, int64_t high) { return max(low, min(v, high)); }

// The row at place `at` of the order in which the kernel takes rows; past the end of the batch, row 0 without steps.
__device__ __forceinline__ Row row_at(const Rows& r, int64_t at) {
  const bool live = at < r.batch;
  Row row{};
  row.index = live ? (r.order ? r.order[at] : at) : 0;
  const int64_t source = r.history ? clamp(r.history[row.index], 0, r.histories - 1) : row.index;
  int64_t length;
  if (r.offsets) {
    row.x = clamp(r.offsets[source], 0, r.x_rows);
    row.y = r.y_start ? clamp(r.y_start[row.index], 0, r.y_rows) : row.x;
    length = min(r.offsets[source + 1] - row.x, min(r.x_rows - row.x, r.y_rows - row.y));
    row.attention = row.y;
  } else {
    length = r.lengths ? min(r.lengths[source], r.steps) : r.steps;
    row.attention = row.index * r.steps;
    row.x = r.time_major ? source : source * r.steps;
    row.y = r.time_major ? row.index : row.attention;
  }
  row.length = live ? int(max(length, int64_t(0))) : 0;
  if (r.reverse && row.length > 0) {
    const int64_t last = row.length - 1;
    row.attention += last;
    row.x += last * (r.time_major ? r.histories : 1);
    row.y += last * (r.time_major ? r.batch : 1);
  }
  return row;
}

// How many flat rows are between one step of a row and the next.
struct Strides {
  int64_t x, y, attention;
};

__device__ __forceinline__ Strides strides_of(const Rows& r) {
  const int64_t sign = r.reverse ? -1 : 1;
  return {r.time_major ? sign * r.histories : sign, r.time_major ? sign * r.batch : sign, sign};
}

// Where a [batch, H] tensor has the value of `unit` for the row at `place` of the kernel's order.
__device__ __forceinline__ int64_t state_at(const Inputs& in, int64_t place, int unit) {
  return (in.rows.order ? in.rows.order[place] : place) * in.cell.hidden + unit;
}

// Run the instance of the kernel's loop for the cell's reset and input scaling.
template <class Kernel>
__device__ __forceinline__ void run_form(Kernel& kernel, const Cell& cell) {
  if (cell.reset_before) {
    cell.scale_input ? kernel.template run<true, true>() : kernel.template run<true, false>();
  } else {
    cell.scale_input ? kernel.template run<false, true>() : kernel.template run<false, false>();
  }
}

// Zeros that are read in place of an absent tensor; two, because some tensors are read in pairs.
alignas(8) __device__ const float kNothing[2] = {0.f, 0.f};

}  // namespace dien::cuda
