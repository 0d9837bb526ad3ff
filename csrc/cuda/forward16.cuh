// The forward on tiles of 16 rows, one barrier a step (two with the reset before the product).
//
// The state is float32 in registers; what the product reads is its rounded copy in shared memory, written for the next
// step while slower warps still read this one's (two buffers).
#pragma once
#include "tile16.cuh"

namespace dien::cuda {

template <class S, int Padded>
struct Forward16 : Tile16<S, Padded> {
  using Tile = Tile16<S, Padded>;
  using Tile::group, Tile::unit, Tile::in;
  using typename Tile::Element, typename Tile::Pair;
  // Steps whose inputs are on their way. Short steps do not outlast the memory's latency; long ones need the registers.
  static constexpr int kDepth = S::kParts == 1 && Padded <= 64 ? 2 : 1;

  struct Shared {
    alignas(16) typename Tile::Operand h[2];
    alignas(16) typename Tile::Operand q;  // r h, where the reset comes before the product
    alignas(16) float bias[4][Padded];
  };

  // A thread's part of a step's inputs.
  struct Ahead {
    Pair gate[2][3];
    float attention[2];
  };

  Shared& shared;
  typename Tile::Weights w[3];
  float h[4] = {0, 0, 0, 0};
  const unsigned char* projection[2];
  const float* attention[2];
  Element* y[2];
  int length[2];  // 0 in threads of padded units, which have nothing to load, change or store
  int longest = 0;
  int64_t projection_step, attention_step, y_step;
  Ahead ahead[kDepth];

  __device__ __forceinline__ Forward16(const Forward& p, Shared& memory) : Tile(p.in), shared(memory) {
#pragma unroll
    for (int gate = 0; gate < 3; ++gate) {
      typename Tile::Raw raw;
      Tile::template load_weights<false>(raw, gate);
      Tile::split(w[gate], raw);
    }
    clear(shared);  // also keeps the weights' loads, which take many registers, apart from what follows
    const Strides strides = strides_of(in.rows);
    constexpr int64_t kWidth = 3 * Padded * Tile::kSize;
    projection_step = strides.x * kWidth;
    attention_step = in.attention ? strides.attention : 0;
    y_step = strides.y * in.cell.hidden;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Row row = row_at(in.rows, Tile::place_of(2 * i));
      longest = max(longest, row.length);
      length[i] = unit < in.cell.hidden ? row.length : 0;
      const int64_t x = row.length > 0 ? row.x : 0;  // a row without steps may start past the end
      projection[i] = static_cast<const unsigned char*>(in.projection) + x * kWidth + unit * Tile::kSize;
      attention[i] = in.attention && row.length > 0 ? in.attention + row.attention : kNothing;
      y[i] = static_cast<Element*>(p.y) + row.y * in.cell.hidden + unit;
    }
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) longest = max(longest, __shfl_xor_sync(~0u, longest, lanes));
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (in.h0 && Tile::exists(e)) h[e] = in.h0[Tile::state_at(e)];
    }
    Tile::share(shared.h[0], h);
    Tile::share_biases(shared.bias);
    __syncthreads();
  }

  // Step `t` of both rows; past a row's end the pointers stay on its last step, and what they bring is not used.
  __device__ __forceinline__ void fetch(Ahead& to, int t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int gate = 0; gate < 3; ++gate)
        to.gate[i][gate] = *reinterpret_cast<const Pair*>(projection[i] + gate * Padded * Tile::kSize);
      to.attention[i] = *attention[i];
      if (t + 1 < length[i]) {
        projection[i] += projection_step;
        attention[i] += attention_step;
      }
    }
  }

  template <bool Before, bool Scale>
  __device__ __forceinline__ void step(int t, int buffer, Ahead& now, const float (&b_hn)[2], float sign) {
    float c[3][4], x_n[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int gate = 0; gate < 3; ++gate) {
        const float2 pair = S::widen_pair(now.gate[i][gate]);
        const float value[2] = {pair.x, pair.y};
        const float2 b = Scale ? *reinterpret_cast<const float2*>(&shared.bias[gate][unit]) : float2{};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float x = Scale ? fmaf(now.attention[i], value[j], j ? b.y : b.x) : value[j];
          if (gate < 2 || Before) c[gate][2 * i + j] = x;
          if (gate == 2 && !Before) c[2][2 * i + j] = b_hn[j], x_n[2 * i + j] = x;
        }
      }
    }
    float alpha[2], beta[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      alpha[i] = fmaf(in.cell.alpha1, now.attention[i], in.cell.alpha0);
      beta[i] = fmaf(in.cell.beta1, now.attention[i], in.cell.beta0);
    }
    fetch(now, t + kDepth);
    float r[4];
    Tile::template multiply<0, Before ? 2 : 3>(c, shared.h[buffer], w);
#pragma unroll
    for (int e = 0; e < 4; ++e) r[e] = logistic2(-kLog2E * c[0][e]);
    if constexpr (Before) {
      float q[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) q[e] = r[e] * h[e];
      Tile::share(shared.q, q);
      __syncthreads();
      Tile::template multiply<2, 1>(c, shared.q, w);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = e >> 1;
      const float u = logistic2(sign * c[1][e]);
      const float n = S::tanh(Before ? c[2][e] : fmaf(r[e], c[2][e], x_n[e]));
      const float next = next_state(h[e], u, n, alpha[i], beta[i]);
      h[e] = t < length[i] ? next : h[e];
    }
    Tile::share(shared.h[buffer ^ 1], h);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (t < length[i]) *reinterpret_cast<Pair*>(y[i]) = S::round_pair(h[2 * i], h[2 * i + 1]);
      y[i] += y_step;
    }
    __syncthreads();
  }

  template <bool Before, bool Scale>
  __device__ __forceinline__ void run() {
    const float b_hn[2] = {shared.bias[3][unit], shared.bias[3][unit + 1]};
    const float sign = in.cell.keep_side ? kLog2E : -kLog2E;
#pragma unroll
    for (int d = 0; d < kDepth; ++d) fetch(ahead[d], d);
#pragma unroll 1
    for (int t = 0; t < longest; t += 2) {
      step<Before, Scale>(t, 0, ahead[0], b_hn, sign);
      if (t + 1 < longest) step<Before, Scale>(t + 1, 1, ahead[kDepth - 1], b_hn, sign);
    }
  }

  __device__ __forceinline__ void store_last(void* h_n) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (Tile::exists(e)) static_cast<Element*>(h_n)[Tile::state_at(e)] = S::round(h[e]);
    }
  }
};

template <class S, int Padded>
__global__ void __launch_bounds__(Tile16<S, Padded>::kThreads) forward16(const Forward p) {
  using Kernel = Forward16<S, Padded>;
  __shared__ typename Kernel::Shared shared;
  Kernel kernel(p, shared);
  const Cell& cell = p.in.cell;
  if (cell.reset_before) {
    cell.scale_input ? kernel.template run<true, true>() : kernel.template run<true, false>();
  } else {
    cell.scale_input ? kernel.template run<false, true>() : kernel.template run<false, false>();
  }
  kernel.store_last(p.h_n);
}

}  // namespace dien::cuda
