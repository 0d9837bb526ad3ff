// The forward on tiles of 8 rows, for 16-bit storage. There are twice as many tiles as with 16 rows, and each has half
// of the activations to compute. It is for small batches, whose time is the latency of their steps.
//
// The weights are the left operand here: a warp owns 16 units for all three gates, and lane 4 g + q (group g, place q)
// has the units g and g + 8 of rows 2q and 2q + 1. The projection's rows are copied to a ring of four slots in shared
// memory, three steps ahead, and read transposed. States are transposed by movmatrix before they are stored.
#pragma once
#include "tile.cuh"

namespace dien::cuda {

template <class S, int Padded>
struct Forward8 {
  static_assert(sizeof(typename S::Element) == 2, "movmatrix moves 16 bits");
  static constexpr int kWarps = (Padded + 15) / 16;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kBytes = (Padded * 2 + 31) / 32 * 32;  // of one row of an operand
  static constexpr int kSteps = kBytes / 32;                  // matrix instructions along a row
  static constexpr int kStride = kBytes + 16;  // an odd multiple of 16, so that ldmatrix has no bank conflict
  static constexpr int kTile = 8 * kStride;
  static constexpr int kGate = Padded * 2;  // bytes of a gate in a row of the projection
  static constexpr int kWidth = 3 * kGate;
  static constexpr int kRowStride = kWidth % 32 ? kWidth : kWidth + 16;
  static constexpr int kSlots = 4, kAhead = kSlots - 1;
  static constexpr int kChunks = 8 * kWidth / 16;  // chunks of 16 bytes in a slot
  static constexpr int kCopies = (kChunks + kThreads - 1) / kThreads;

  struct Slot {
    alignas(16) unsigned char projection[8 * kRowStride];
    alignas(16) float attention[8];
  };
  struct Shared {
    alignas(16) unsigned char h[2][kTile];
    alignas(16) unsigned char q[kTile];  // r h, if the reset comes before the product
    Slot slot[kSlots];
  };

  const Inputs& in;
  Shared& shared;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = lane >> 2, place = lane & 3;
  const int first = warp * 16;                               // the first of the warp's 16 units
  const bool both = Padded % 16 == 0 || first + 8 < Padded;  // whether the second eight of them exist
  uint32_t w[3][kSteps][4];
  float h[4] = {0, 0, 0, 0};  // units g, g, g + 8, g + 8 of rows 2q, 2q + 1, 2q, 2q + 1
  int length[2];              // the lengths of rows 2q, 2q + 1
  int longest = 0;
  // The thread stores the states of row g, two units at a time.
  int store_length[2];
  typename S::Element* y;
  int64_t y_step;
  // The part of the projection and of the attention that the thread copies into each slot.
  const unsigned char* source[kCopies];
  uint32_t target[kCopies];
  int copy_length[kCopies];
  int64_t source_step;
  const float* attention = nullptr;
  int attention_length = 0;
  int64_t attention_step;

  __device__ __forceinline__ Row row_of(int i) const { return row_at(in.rows, int64_t(blockIdx.x) * 8 + i); }

  __device__ __forceinline__ Forward8(const Forward& p, Shared& memory) : in(p.in), shared(memory) {
    const Strides strides = strides_of(in.rows);
    source_step = strides.x * kWidth;
    attention_step = strides.attention;
    y_step = strides.y * in.cell.hidden;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      length[j] = row_of(2 * place + j).length;
      longest = max(longest, length[j]);
    }
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) longest = max(longest, __shfl_xor_sync(~0u, longest, lanes));
    const Row stored = row_of(group);
    y = static_cast<typename S::Element*>(p.y) + stored.y * in.cell.hidden + first + 2 * place;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      store_length[half] = p.y && first + half * 8 + 2 * place < in.cell.hidden ? stored.length : 0;
#pragma unroll
    for (int n = 0; n < kCopies; ++n) {
      const int chunk = threadIdx.x + n * kThreads, i = chunk / (kWidth / 16), column = chunk % (kWidth / 16) * 16;
      const Row row = row_of(i & 7);
      copy_length[n] = chunk < kChunks ? row.length : 0;
      source[n] = static_cast<const unsigned char*>(in.projection) + (row.length > 0 ? row.x : 0) * kWidth + column;
      target[n] = shared_address(shared.slot[0].projection + (i & 7) * kRowStride + column);
    }
    if (threadIdx.x < 8 && in.attention) {
      const Row row = row_of(threadIdx.x);
      attention = in.attention + row.attention;
      attention_length = row.length;
    }
  }

  __device__ __forceinline__ float bias(const float* b, int gate, int half) const {
    const int unit = first + half * 8 + group;
    return b && unit < in.cell.hidden ? b[gate * in.cell.hidden + unit] : 0.f;
  }

  // A gate that nothing reads (AGRU's update gate) has zeros for weights, so that a NaN in them has no effect.
  __device__ __forceinline__ void load_weights() {
    const int hidden = in.cell.hidden;
    const auto* weights = static_cast<const typename S::Element*>(in.w_hh);
    const bool update = in.cell.beta0 != 0.f || in.cell.beta1 != 0.f;
#pragma unroll
    for (int gate = 0; gate < 3; ++gate) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const int row = first + group + (part & 1) * 8, column = k * 16 + 2 * place + (part >> 1) * 8;
          typename S::Element value[2];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const bool inside = row < hidden && column + j < hidden && (gate != 1 || update);
            value[j] = inside ? weights[(int64_t(gate) * hidden + row) * hidden + column + j] : S::round(0.f);
          }
          memcpy(&w[gate][k][part], value, 4);
        }
      }
    }
  }

  __device__ __forceinline__ void load_state() {
    clear(shared);
    if (in.h0) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t at = int64_t(blockIdx.x) * 8 + 2 * place + (e & 1);
        const int unit = first + group + (e >> 1) * 8;
        if (at < in.rows.batch && unit < in.cell.hidden) h[e] = in.h0[state_at(in, at, unit)];
      }
    }
    __syncthreads();
    uint32_t words_of_h[2];
    transpose(words_of_h, h);
    share(shared.h[0], words_of_h);
    __syncthreads();
  }

  // Round `v` and transpose it within the warp. The thread gets units 2q and 2q + 1 of row g: in words[0] those of the
  // warp's first eight units, in words[1] those of the second eight.
  __device__ __forceinline__ void transpose(uint32_t (&words)[2], const float (&v)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;"
                   : "=r"(words[half])
                   : "r"(S::round_pair(v[2 * half], v[2 * half + 1])));
  }

  __device__ __forceinline__ void share(unsigned char* tile, const uint32_t (&words)[2]) {
    uint32_t* at = reinterpret_cast<uint32_t*>(tile + group * kStride + (first + 2 * place) * 2);
    at[0] = words[0];
    if (both) at[4] = words[1];
  }

  template <int First, int Count>
  __device__ __forceinline__ void multiply(float (&c)[3][4], const unsigned char* tile) {
    const uint32_t from = shared_address(tile + (lane & 7) * kStride + (lane >> 3) * 16);
#pragma unroll
    for (int k = 0; k < kSteps; k += 2) {
      uint32_t b[4];
      if (k + 1 < kSteps) {
        load_matrix_x4(b, from + k * 32);
      } else {  // ldmatrix.x4 would read past the end of the row
        load_matrix_x2(b, shared_address(tile + (lane & 7) * kStride + ((lane >> 3) & 1) * 16) + k * 32);
      }
#pragma unroll
      for (int gate = First; gate < First + Count; ++gate) S::multiply(c[gate], w[gate][k], b[0], b[1]);
      if (k + 1 < kSteps) {
#pragma unroll
        for (int gate = First; gate < First + Count; ++gate) S::multiply(c[gate], w[gate][k + 1], b[2], b[3]);
      }
    }
  }

  // Start to copy step `t` into its slot. Past a row's end its last projection is copied again, and not used.
  __device__ __forceinline__ void copy(int t) {
    const uint32_t slot = (t & (kSlots - 1)) * uint32_t(sizeof(Slot));
#pragma unroll
    for (int n = 0; n < kCopies; ++n) {
      if ((n + 1) * kThreads <= kChunks || int(threadIdx.x) + n * kThreads < kChunks)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target[n] + slot), "l"(source[n]) : "memory");
      if (t + 1 < copy_length[n]) source[n] += source_step;
    }
    if (t < attention_length) {
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(
                       shared_address(&shared.slot[0].attention[threadIdx.x & 7]) + slot),
                   "l"(attention)
                   : "memory");
      attention += attention_step;
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  template <bool Before, bool Scale>
  __device__ __forceinline__ void run() {
    float b[3][2], b_hn[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      b_hn[j] = bias(in.b_hh, 2, j);
#pragma unroll
      for (int gate = 0; gate < 3; ++gate) {
        b[gate][j] = bias(in.b_ih, gate, j);
        if (gate < 2 || Before) b[gate][j] += bias(in.b_hh, gate, j);
      }
    }
    const float sign = in.cell.keep_side ? kLog2E : -kLog2E;
    // The projection of the warp's units is two 8 x 8 blocks for each gate. For ldmatrix, lanes 0 to 7 give the
    // addresses of the rows of r's first block, lanes 8 to 15 of its second, and lanes 16 to 31 those of u. Another
    // ldmatrix loads n. Where the second block does not exist, the first is loaded in its place.
    const int half = both ? (lane >> 3) & 1 : 0;
    const uint32_t block =
        shared_address(shared.slot[0].projection + (lane & 7) * kRowStride + (lane >> 4) * kGate + first * 2) +
        half * 16;
#pragma unroll
    for (int t = 0; t < kAhead; ++t) copy(t);
    asm volatile("cp.async.wait_group 2;" ::: "memory");
    __syncthreads();
    unsigned char *now = shared.h[0], *next = shared.h[1];
#pragma unroll 1
    for (int t = 0; t < longest; ++t) {
      const uint32_t slot = (t & (kSlots - 1)) * uint32_t(sizeof(Slot));
      uint32_t ru[4], n_[2];
      load_matrix_x4_transposed(ru, block + slot);
      load_matrix_x2_transposed(n_, block + slot + (2 - (lane >> 4)) * kGate);
      const float2 a = *reinterpret_cast<const float2*>(
          reinterpret_cast<const unsigned char*>(&shared.slot[0].attention[2 * place]) + slot);
      const float attention_of[2] = {a.x, a.y};
      float c[3][4], x_n[4];
#pragma unroll
      for (int gate = 0; gate < 3; ++gate) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 pair = S::widen_pair(gate < 2 ? ru[gate * 2 + i] : n_[i]);
          const float value[2] = {pair.x, pair.y};
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float x = Scale ? fmaf(attention_of[j], value[j], b[gate][i]) : value[j];
            if (gate < 2 || Before) c[gate][2 * i + j] = x;
            if (gate == 2 && !Before) c[2][2 * i + j] = b_hn[i], x_n[2 * i + j] = x;
          }
        }
      }
      float alpha[2], beta[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        alpha[j] = fmaf(in.cell.alpha1, attention_of[j], in.cell.alpha0);
        beta[j] = fmaf(in.cell.beta1, attention_of[j], in.cell.beta0);
      }
      copy(t + kAhead);
      float r[4];
      uint32_t words[2];
      multiply<0, Before ? 2 : 3>(c, now);
#pragma unroll
      for (int e = 0; e < 4; ++e) r[e] = logistic2(-kLog2E * c[0][e]);
      if constexpr (Before) {
        float q[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) q[e] = r[e] * h[e];
        transpose(words, q);
        share(shared.q, words);
        __syncthreads();
        multiply<2, 1>(c, shared.q);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int j = e & 1;
        const float u = logistic2(sign * c[1][e]);
        const float n = S::tanh(Before ? c[2][e] : fmaf(r[e], c[2][e], x_n[e]));
        const float moved = next_state(h[e], u, n, alpha[j], beta[j]);
        h[e] = t < length[j] ? moved : h[e];
      }
      transpose(words, h);
      share(next, words);
      if (t < store_length[0]) *reinterpret_cast<uint32_t*>(y) = words[0];
      if (t < store_length[1]) *reinterpret_cast<uint32_t*>(y + 8) = words[1];
      y += y_step;
      unsigned char* swap = now;
      now = next, next = swap;
      asm volatile("cp.async.wait_group 2;" ::: "memory");
      __syncthreads();
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
  }

  __device__ __forceinline__ void store_last(void* h_n) {
    auto* last = static_cast<typename S::Element*>(h_n);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t at = int64_t(blockIdx.x) * 8 + 2 * place + (e & 1);
      const int unit = first + group + (e >> 1) * 8;
      if (at < in.rows.batch && unit < in.cell.hidden) last[state_at(in, at, unit)] = S::round(h[e]);
    }
  }
};

template <class S, int Padded>
__global__ void __launch_bounds__(Forward8<S, Padded>::kThreads) forward8(const Forward p) {
  using Kernel = Forward8<S, Padded>;
  __shared__ typename Kernel::Shared shared;
  Kernel kernel(p, shared);
  kernel.load_weights();
  kernel.load_state();
  run_form(kernel, p.in.cell);
  kernel.store_last(p.h_n);
}

}  // namespace dien::cuda
