// The backward on tiles of 16 rows: steps from the last to the first, with the gates computed once more from the states.
// Equation numbers are those of docs/math.md.
//
// Both W_hh and its transpose stay in registers. A step's gates depend on no gradient, so what runs from step to step is
// short: elementwise, to shared memory, a barrier, the product with W_hh^T. With the reset before the product there are
// two barriers, and the next step's r and q are computed between them. What is left to products over all steps (dx, dW)
// is written as it comes: see `Backward` in params.h.
#pragma once
#include "tile16.cuh"

namespace dien::cuda {

template <class S, int Padded>
struct Backward16 : Tile16<S, Padded> {
  using Tile = Tile16<S, Padded>;
  using Tile::group, Tile::lane, Tile::warp, Tile::place, Tile::unit, Tile::in;
  using typename Tile::Element, typename Tile::Pair, typename Tile::Operand;
  // Of what the reset after the product exchanges: with two, a step has one barrier. Float32's are too large for two.
  static constexpr int kBuffers = S::kParts == 1 ? 2 : 1;
  static constexpr int kWarps = Padded / 8;
  // Where registers do not hold both, W_hh^T is in dynamic shared memory, each thread's own fragments: 8 bytes at a time.
  static constexpr bool kShared = S::kParts == 2 && Padded > 40;
  static constexpr int kDynamic = kShared ? 3 * Tile::kSteps * Tile::kThreads * 8 : 0;

  struct Shared {
    alignas(16) Operand h[kBuffers];     // the state before the step
    alignas(16) Operand q;               // r h, where the reset comes before the product
    alignas(16) Operand d[kBuffers][3];  // da_r, da_u, dgh_n
    alignas(16) float bias[4][Padded];
    float d_attention[2][16][kWarps + 1];
  };

  // A thread's part of a step's inputs.
  struct Ahead {
    float2 gate[2][3];
    Pair h[2], dy[2];
    float attention[2];
  };

  const Backward& p;
  Shared& shared;
  typename Tile::Raw w[3], transposed[kShared ? 1 : 3];
  float dh[4] = {0, 0, 0, 0}, h0[4] = {0, 0, 0, 0};
  float d_bias[4][2] = {};  // r, u, n, gh_n
  int length[2], longest = 0;
  const float* projection[2];
  const float* attention[2];
  float* d_attention[2];
  const Element *h[2], *dy[2];
  Element *gates[2], *states[2];
  int64_t projection_step, attention_step, h_step, dy_step, y_step;
  Ahead ahead[2];

  __device__ __forceinline__ Backward16(const Backward& params, Shared& memory)
      : Tile(params.in), p(params), shared(memory) {
#pragma unroll
    for (int gate = 0; gate < 3; ++gate) {
      Tile::template load_weights<false>(w[gate], gate);
      Tile::template load_weights<true>(transposed[kShared ? 0 : gate], gate);
      if constexpr (kShared) {
#pragma unroll
        for (int k = 0; k < Tile::kSteps; ++k)
          *fragment(gate, k) = make_uint2(transposed[0][k][0], transposed[0][k][1]);
      }
    }
    clear(shared);  // also keeps the weights' loads, which take many registers, apart from what follows
    Tile::share_biases(shared.bias);
    const Strides strides = strides_of(in.rows);
    const int hidden = in.cell.hidden;
    const bool inside = unit < hidden;
    constexpr int64_t kWidth = 3 * Padded;
    projection_step = strides.x * kWidth;
    attention_step = in.attention ? strides.attention : 0;
    y_step = strides.y;
    h_step = inside ? strides.y * hidden : 0;
    dy_step = p.dy ? h_step : 0;
    const int gate_width = Padded * (in.cell.scale_input ? 6 : in.cell.reset_before ? 3 : 4);
    const int state_width = Padded * (in.cell.reset_before ? 2 : 1);
    const Element* nothing = reinterpret_cast<const Element*>(kNothing);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Row row = row_at(in.rows, Tile::place_of(2 * i));
      length[i] = row.length;
      longest = max(longest, row.length);
      const bool any = row.length > 0;  // a row without steps may start past the end
      const int64_t last = max(row.length - 1, 0);
      const int64_t y = row.y + last * strides.y;
      projection[i] = static_cast<const float*>(in.projection) + (any ? row.x + last * strides.x : 0) * kWidth + unit;
      const int64_t at = row.attention + last * strides.attention;
      attention[i] = in.attention && any ? in.attention + at : kNothing;
      d_attention[i] = p.d_attention + at;
      // The state before the last step; of the first step it is h0.
      const int64_t before = y - (row.length > 1 ? strides.y : 0);
      h[i] = any && inside ? static_cast<const Element*>(p.y) + before * hidden + unit : nothing;
      dy[i] = any && inside && p.dy ? static_cast<const Element*>(p.dy) + y * hidden + unit : nothing;
      gates[i] = static_cast<Element*>(p.gates) + y * gate_width + unit;
      states[i] = static_cast<Element*>(p.states) + y * state_width + unit;
    }
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) longest = max(longest, __shfl_xor_sync(~0u, longest, lanes));
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (in.h0 && Tile::exists(e)) h0[e] = in.h0[Tile::state_at(e)];
      if (p.dh_n && Tile::exists(e)) dh[e] = S::widen(static_cast<const Element*>(p.dh_n)[Tile::state_at(e)]);
    }
  }

  // Step `t`, from the last to the first. The pointers of a row stay on its last step until `t` is there, and on its
  // first one afterwards; what they bring then is not used.
  __device__ __forceinline__ void fetch(Ahead& to, int t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int gate = 0; gate < 3; ++gate)
        to.gate[i][gate] = *reinterpret_cast<const float2*>(projection[i] + gate * Padded);
      to.attention[i] = *attention[i];
      to.h[i] = *reinterpret_cast<const Pair*>(h[i]);
      to.dy[i] = *reinterpret_cast<const Pair*>(dy[i]);
      if (t < length[i] && t > 0) {
        projection[i] -= projection_step;
        attention[i] -= attention_step;
        dy[i] -= dy_step;
        if (t > 1) h[i] -= h_step;
      }
    }
  }

  __device__ __forceinline__ void state_before(float (&v)[4], const Ahead& now, int t) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 pair = S::widen_pair(now.h[i]);
      v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
    }
    if (t == 0) {
#pragma unroll
      for (int e = 0; e < 4; ++e) v[e] = h0[e];
    }
  }

  // The unscaled projection, and what stands before the products with W_hh, for `Count` gates from `First` on.
  template <bool Scale, int First, int Count>
  __device__ __forceinline__ void start(float (&c)[3][4], float (&x)[3][4], const Ahead& now) const {
#pragma unroll
    for (int gate = First; gate < First + Count; ++gate) {
      const float2 b = *reinterpret_cast<const float2*>(&shared.bias[gate][unit]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        x[gate][2 * i] = now.gate[i][gate].x, x[gate][2 * i + 1] = now.gate[i][gate].y;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int e = 2 * i + j;
          c[gate][e] = (Scale ? now.attention[i] * x[gate][e] : x[gate][e]) + (j ? b.y : b.x);
        }
      }
    }
  }

  __device__ __forceinline__ static uint2* fragment(int gate, int k) {
    extern __shared__ uint2 fragments[];
    return fragments + (gate * Tile::kSteps + k) * Tile::kThreads + threadIdx.x;
  }

  // c += tile W_gate^T
  __device__ __forceinline__ void multiply_transposed(float (&c)[4], const Operand& tile, int gate) const {
    const uint32_t from = Tile::fragments(tile);
    float small[4] = {};
#pragma unroll
    for (int k = 0; k < Tile::kSteps; ++k) {
      uint32_t a[S::kParts][4], b[S::kParts][2];
      Tile::load_fragment(a, from, k);
      if constexpr (kShared) {
        const uint2 words = *fragment(gate, k);
        const typename Tile::Raw one = {{words.x, words.y}};
        Tile::parts_of(b, one, 0);
      } else {
        Tile::parts_of(b, transposed[gate], k);
      }
      Tile::multiply_step(c, small, a, b);
    }
    if constexpr (S::kParts == 2) {
#pragma unroll
      for (int e = 0; e < 4; ++e) c[e] += small[e];
    }
  }

  __device__ __forceinline__ void store(Element* at, int column, const float (&v)[4], int i, float scale = 1.f) const {
    *reinterpret_cast<Pair*>(at + column * Padded) = S::round_pair(scale * v[2 * i], scale * v[2 * i + 1]);
  }

  __device__ __forceinline__ void sum_bias(int gate, const float (&v)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) d_bias[gate][e & 1] += v[e];
  }

  // The attention's gradient: over the warp's units here, over warps once all have been here.
  __device__ __forceinline__ void share_attention(float (&part)[16][kWarps + 1], const float (&d_a)[2]) const {
    if (!p.d_attention) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = d_a[i];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (place == 0) part[group + 8 * i][warp] = sum;
    }
  }

  __device__ __forceinline__ void store_attention(const float (&part)[16][kWarps + 1], int t) {
    if (!p.d_attention || warp != 0 || place != 0) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = 0;
#pragma unroll
      for (int other = 0; other < kWarps; ++other) sum += part[group + 8 * i][other];
      if (t < length[i]) {
        *d_attention[i] = sum;
        d_attention[i] -= attention_step;
      }
    }
  }

  // Of one value of the thread: (10) to (13) and the attention's part of (21); zeros where the step does not exist.
  struct Gradient {
    float an, au, stay, d_a;
  };
  __device__ __forceinline__ Gradient gradient(int e, int t, float before, float u, float n, const Ahead& now) const {
    const int i = e >> 1;
    const float2 pair = S::widen_pair(now.dy[i]);
    const float alpha = fmaf(in.cell.alpha1, now.attention[i], in.cell.alpha0);
    const float beta = fmaf(in.cell.beta1, now.attention[i], in.cell.beta0);
    const auto d = step_gradient(dh[e] + (e & 1 ? pair.y : pair.x), before, u, n, alpha, beta);
    const bool valid = t < length[i];
    const float au = in.cell.keep_side ? -d.au : d.au;
    const float d_a = fmaf(in.cell.beta1, u, in.cell.alpha1) * d.dg;
    return {valid ? d.an : 0.f, valid ? au : 0.f, valid ? d.dh : dh[e], valid ? d_a : 0.f};
  }

  // The reset after the product.
  template <bool Scale>
  __device__ __forceinline__ void step_after(int t, int buffer, Ahead& now, const Ahead& next, float sign) {
    constexpr bool kTwo = kBuffers == 2;
    auto& exchanged = shared.d[kTwo ? buffer : 0];
    float c[3][4], x[3][4], before[4], x_n[4], ar[4], au[4], an[4], ghn[4], stay[4], d_a[2] = {0, 0};
    state_before(before, now, t);
    start<Scale, 0, 3>(c, x, now);
    const float2 b_hn = *reinterpret_cast<const float2*>(&shared.bias[3][unit]);
#pragma unroll
    for (int e = 0; e < 4; ++e) x_n[e] = c[2][e], c[2][e] = e & 1 ? b_hn.y : b_hn.x;
    Tile::template multiply<0, 3>(c, shared.h[kTwo ? buffer : 0], w);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float r = logistic2(-kLog2E * c[0][e]), u = logistic2(sign * c[1][e]);
      const float n = S::tanh(fmaf(r, c[2][e], x_n[e]));
      const Gradient d = gradient(e, t, before[e], u, n, now);
      an[e] = d.an, au[e] = d.au, stay[e] = d.stay;
      ghn[e] = t < length[e >> 1] ? d.an * r : 0.f;  // r may be NaN where no step is
      ar[e] = t < length[e >> 1] ? reset_gradient(d.an * c[2][e], r) : 0.f;
      d_a[e >> 1] += d.d_a;
      const float scaled = ar[e] * x[0][e] + au[e] * x[1][e] + an[e] * x[2][e];
      if (Scale) d_a[e >> 1] += t < length[e >> 1] ? scaled : 0.f;
    }
    Tile::share(exchanged[0], ar);
    Tile::share(exchanged[1], au);
    Tile::share(exchanged[2], ghn);
    share_attention(shared.d_attention[buffer], d_a);
    sum_bias(0, ar), sum_bias(1, au), sum_bias(2, an), sum_bias(3, ghn);
    if (kTwo && t > 0) {
      state_before(x_n, next, t - 1);
      Tile::share(shared.h[buffer ^ 1], x_n);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (t < length[i]) {
        store(states[i], 0, before, i);
        store(gates[i], Scale ? 2 : 0, ghn, i);
        store(gates[i], Scale ? 0 : 1, ar, i);
        store(gates[i], Scale ? 1 : 2, au, i);
        if (Scale) {
          store(gates[i], 3, ar, i, now.attention[i]);
          store(gates[i], 4, au, i, now.attention[i]);
          store(gates[i], 5, an, i, now.attention[i]);
        } else {
          store(gates[i], 3, an, i);
        }
        states[i] -= y_step * Padded;
        gates[i] -= y_step * Padded * (Scale ? 6 : 4);
      }
    }
    fetch(now, t - 2);
    __syncthreads();
    float part[2][4] = {};
    multiply_transposed(stay, exchanged[0], 0);
    multiply_transposed(part[0], exchanged[1], 1);
    multiply_transposed(part[1], exchanged[2], 2);
    store_attention(shared.d_attention[buffer], t);
#pragma unroll
    for (int e = 0; e < 4; ++e) dh[e] = stay[e] + (part[0][e] + part[1][e]);
    if constexpr (!kTwo) {
      if (t > 0) {
        state_before(x_n, next, t - 1);
        Tile::share(shared.h[0], x_n);
      }
      __syncthreads();
    }
  }

  // r, u and q of a step whose state is in shared memory; q goes there too.
  template <bool Scale>
  __device__ __forceinline__ void reset_of(float (&r)[4], float (&u)[4], float (&x)[3][4], const Ahead& now, int t,
                                           float sign) {
    float c[3][4], before[4], q[4];
    start<Scale, 0, 2>(c, x, now);
    Tile::template multiply<0, 2>(c, shared.h[0], w);
    state_before(before, now, t);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      r[e] = logistic2(-kLog2E * c[0][e]), u[e] = logistic2(sign * c[1][e]);
      q[e] = r[e] * before[e];
    }
    Tile::share(shared.q, q);
  }

  // The reset before the product: r, u and q of this step are there, those of the next one are left.
  template <bool Scale>
  __device__ __forceinline__ void step_before(int t, float (&r)[4], float (&u)[4], Ahead& now, const Ahead& next,
                                              float sign) {
    auto& exchanged = shared.d[0];
    float c[3][4], x[3][4], before[4], q[4], ar[4], au[4], an[4], stay[4], d_a[2] = {0, 0};
    state_before(before, now, t);
    start<Scale, 0, 3>(c, x, now);
    Tile::template multiply<2, 1>(c, shared.q, w);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const Gradient d = gradient(e, t, before[e], u[e], S::tanh(c[2][e]), now);
      an[e] = d.an, au[e] = d.au, stay[e] = d.stay;
      d_a[e >> 1] += d.d_a;
      q[e] = r[e] * before[e];
    }
    Tile::share(exchanged[1], au);
    Tile::share(exchanged[2], an);
    if (t > 0) {
      float earlier[4];
      state_before(earlier, next, t - 1);
      Tile::share(shared.h[0], earlier);
    }
    __syncthreads();
    float dq[4] = {};
    multiply_transposed(dq, exchanged[2], 2);
    multiply_transposed(stay, exchanged[1], 1);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool valid = t < length[e >> 1];
      ar[e] = valid ? reset_gradient(dq[e] * before[e], r[e]) : 0.f;  // (14b), (15)
      stay[e] += valid ? dq[e] * r[e] : 0.f;
      const float scaled = ar[e] * x[0][e] + au[e] * x[1][e] + an[e] * x[2][e];
      if (Scale) d_a[e >> 1] += valid ? scaled : 0.f;
    }
    Tile::share(exchanged[0], ar);
    share_attention(shared.d_attention[0], d_a);
    sum_bias(0, ar), sum_bias(1, au), sum_bias(2, an);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (t < length[i]) {
        store(states[i], 0, before, i);
        store(states[i], 1, q, i);
        store(gates[i], 0, ar, i);
        store(gates[i], 1, au, i);
        store(gates[i], 2, an, i);
        if (Scale) {
          store(gates[i], 3, ar, i, now.attention[i]);
          store(gates[i], 4, au, i, now.attention[i]);
          store(gates[i], 5, an, i, now.attention[i]);
        }
        states[i] -= y_step * Padded * 2;
        gates[i] -= y_step * Padded * (Scale ? 6 : 3);
      }
    }
    fetch(now, t - 2);
    if (t > 0) reset_of<Scale>(r, u, x, next, t - 1, sign);
    __syncthreads();
    multiply_transposed(stay, exchanged[0], 0);
    store_attention(shared.d_attention[0], t);
#pragma unroll
    for (int e = 0; e < 4; ++e) dh[e] = stay[e];
  }

  template <bool Before, bool Scale>
  __device__ __forceinline__ void run() {
    const float sign = in.cell.keep_side ? kLog2E : -kLog2E;
    fetch(ahead[0], longest - 1);
    fetch(ahead[1], longest - 2);
    float first[4], r[4], u[4];
    state_before(first, ahead[0], longest - 1);
    Tile::share(shared.h[0], first);
    __syncthreads();
    if constexpr (Before) {
      float x[3][4];
      reset_of<Scale>(r, u, x, ahead[0], longest - 1, sign);
      __syncthreads();
    }
    if constexpr (S::kParts == 2) {  // one step at a time: two in one loop would not fit registers
#pragma unroll 1
      for (int t = longest - 1; t >= 0; --t) {
        if constexpr (Before) {
          step_before<Scale>(t, r, u, ahead[0], ahead[1], sign);
        } else {
          step_after<Scale>(t, 0, ahead[0], ahead[1], sign);
        }
        const Ahead later = ahead[0];
        ahead[0] = ahead[1], ahead[1] = later;
      }
    } else {
#pragma unroll 1
      for (int t = longest - 1; t >= 0; t -= 2) {
        if constexpr (Before) {
          step_before<Scale>(t, r, u, ahead[0], ahead[1], sign);
          if (t > 0) step_before<Scale>(t - 1, r, u, ahead[1], ahead[0], sign);
        } else {
          step_after<Scale>(t, 0, ahead[0], ahead[1], sign);
          if (t > 0) step_after<Scale>(t - 1, 1, ahead[1], ahead[0], sign);
        }
      }
    }
  }

  __device__ __forceinline__ void store_sums() const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (Tile::exists(e)) p.dh0[Tile::state_at(e)] = dh[e];
    }
    float* sums = p.d_bias + int64_t(blockIdx.x) * 4 * Padded + unit;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float sum = d_bias[gate][j];
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
        if (group == 0) sums[gate * Padded + j] = sum;
      }
    }
  }
};

template <class S, int Padded>
__global__ void __launch_bounds__(Tile16<S, Padded>::kThreads) backward16(const Backward p) {
  using Kernel = Backward16<S, Padded>;
  __shared__ typename Kernel::Shared shared;
  Kernel kernel(p, shared);
  const Cell& cell = p.in.cell;
  if (kernel.longest > 0) {
    if (cell.reset_before) {
      cell.scale_input ? kernel.template run<true, true>() : kernel.template run<true, false>();
    } else {
      cell.scale_input ? kernel.template run<false, true>() : kernel.template run<false, false>();
    }
  }
  kernel.store_sums();
}

}  // namespace dien::cuda
