// The backward on tiles of 16 rows. It goes from the last step to the first and computes the gates again from the
// states. Equation numbers are those of docs/math.md.
//
// The gates of a step do not depend on gradients. So the chain of dependent work from step to step is short:
// elementwise operations, a write to shared memory, a barrier, and the product with W_hh^T. With the reset before the
// product there are two barriers, and r and q of the next step are computed between them. The gate gradients are
// written to memory, and the host computes dx and dW from them by products over all steps: see `Backward` in params.h.
#pragma once
#include "backward_weights.cuh"

namespace dien::cuda {

template <class S, int Padded>
struct Backward16 : Tile16<S, Padded> {
  using Tile = Tile16<S, Padded>;
  using Tile::group, Tile::lane, Tile::warp, Tile::place, Tile::unit, Tile::in;
  using typename Tile::Element, typename Tile::Pair, typename Tile::Operand;
  // Blocks of 448 or 512 threads leave a thread 144 or 128 registers, which cannot hold weights.
  static constexpr bool kLarge = Padded > 64;
  // How many buffers there are for what threads exchange with the reset after the product. With two of them a step has
  // one barrier, otherwise two. float32, and every dtype above 64 units, has one buffer: a second would exceed 48 KB at
  // 40 units in float32, and in 16 bits at 112 units the 99 KB that smaller devices have.
  static constexpr int kBuffers = S::kParts == 1 && !kLarge ? 2 : 1;
  static constexpr int kDepth = kLarge ? 1 : 2;  // how many steps ahead inputs are loaded
  static constexpr int kWarps = Padded / 8;

  struct Shared {
    alignas(16) Operand h[kBuffers];     // the state before the step
    alignas(16) Operand q;               // r h, if the reset comes before the product
    alignas(16) Operand d[kBuffers][3];  // da_r, da_u, dgh_n
    alignas(16) float bias[4][Padded];
    float d_attention[kBuffers][16][kWarps + 1];
  };

  // The inputs of a step `t` that a thread loads ahead. `h` is the state before step t - 1, not `t`, because a state is
  // written to shared memory one step before it is used.
  struct Ahead {
    float2 gate[2][3];
    Pair h[2], dy[2];
    float attention[2];
  };

  const Backward& p;
  Shared& shared;
  BackwardWeights<S, Padded> weights;
  float dh[4] = {0, 0, 0, 0}, h0[4];
  float d_bias[4][2] = {};  // r, u, n, gh_n
  // Flat rows are counted in 32 bits; the host refuses more. A row's step `t` is start + t * stride. A row without
  // steps has last = -1 and a start for which that step is 0.
  int last[2], longest = 0;
  int x_start[2], y_start[2], attention_start[2];
  int x_stride, y_stride, attention_stride;
  // Addresses of the thread's two units in row 0, and the bytes from row to row. For an absent tensor, every row is
  // at `kNothing`.
  const unsigned char *projection, *attention, *y, *dy;
  unsigned char *gates, *states;
  int y_width, dy_width;
  Pair h[2];  // the state before the step
  Ahead ahead[kDepth];

  // The dynamic shared memory; small sizes have only static memory.
  static constexpr int kDynamic = BackwardWeights<S, Padded>::kBytes + (kLarge ? int(sizeof(Shared)) : 0);
  __device__ __forceinline__ static Shared& memory() {
    if constexpr (kLarge) {
      return *reinterpret_cast<Shared*>(dynamic_memory + BackwardWeights<S, Padded>::kBytes);
    } else {
      __shared__ Shared shared;
      return shared;
    }
  }

  __device__ __forceinline__ explicit Backward16(const Backward& params)
      : Tile(params.in), p(params), shared(memory()), weights(*this, params.fragments) {
    clear(shared);  // its barrier also separates the loads of weights, which take many registers, from the rest
    Tile::share_biases(shared.bias);
    const Strides strides = strides_of(in.rows);
    const bool inside = unit < in.cell.hidden;
    projection = bytes(in.projection, true) + unit * 4;
    attention = bytes(in.attention, in.attention);
    y = bytes(p.y, inside) + (inside ? unit * Tile::kSize : 0);
    dy = bytes(p.dy, inside && p.dy) + (inside && p.dy ? unit * Tile::kSize : 0);
    gates = static_cast<unsigned char*>(p.gates) + unit * Tile::kSize;
    states = static_cast<unsigned char*>(p.states) + unit * Tile::kSize;
    y_width = inside ? in.cell.hidden * Tile::kSize : 0;
    dy_width = p.dy ? y_width : 0;
    x_stride = int(strides.x), y_stride = int(strides.y);
    attention_stride = in.attention ? int(strides.attention) : 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Row row = row_at(in.rows, Tile::place_of(2 * i));
      const bool any = row.length > 0;
      longest = max(longest, row.length);
      last[i] = row.length - 1;
      x_start[i] = any ? int(row.x) : x_stride;
      y_start[i] = any ? int(row.y) : y_stride;
      attention_start[i] = any && in.attention ? int(row.attention) : attention_stride;
    }
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) longest = max(longest, __shfl_xor_sync(~0u, longest, lanes));
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      h0[e] = first_state(e);
      if (p.dh_n && Tile::exists(e)) dh[e] = S::widen(static_cast<const Element*>(p.dh_n)[Tile::state_at(e)]);
    }
  }

  __device__ __forceinline__ static const unsigned char* bytes(const void* rows, bool exist) {
    return static_cast<const unsigned char*>(exist ? rows : kNothing);
  }

  // rows + row * width as one multiply-add instruction; the compiler would use several.
  template <class T>
  __device__ __forceinline__ static T* at(T* rows, int row, int width) {
    T* result;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(result) : "r"(row), "r"(width), "l"(rows));
    __builtin_assume(__isGlobal(result));
    return result;
  }

  // Load the state before step `t` from y. In the first step `state_before` puts h0 in its place.
  __device__ __forceinline__ void fetch_state(Pair (&to)[2], int t) const {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      to[i] = *reinterpret_cast<const Pair*>(at(y, y_start[i] + min(max(t - 1, 0), last[i]) * y_stride, y_width));
  }

  // Load the inputs of step `t`. For a step past a row's end its last step is loaded instead, and for negative `t` its
  // first; those values are not used.
  __device__ __forceinline__ void fetch(Ahead& to, int t) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int step = min(max(t, 0), last[i]);
      const unsigned char* from = at(projection, x_start[i] + step * x_stride, 3 * Padded * 4);
#pragma unroll
      for (int gate = 0; gate < 3; ++gate)
        to.gate[i][gate] = *reinterpret_cast<const float2*>(from + gate * Padded * 4);
      const int place = attention_start[i] + step * attention_stride;
      to.attention[i] = *reinterpret_cast<const float*>(at(attention, place, 4));
      to.dy[i] = *reinterpret_cast<const Pair*>(at(dy, y_start[i] + step * y_stride, dy_width));
    }
    fetch_state(to.h, t - 1);
  }

  __device__ __forceinline__ float first_state(int e) const {
    return in.h0 && Tile::exists(e) ? in.h0[Tile::state_at(e)] : 0.f;
  }

  __device__ __forceinline__ void state_before(float (&v)[4], const Pair (&state)[2], int t) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 pair = S::widen_pair(state[i]);
      v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
    }
    if (t == 0) {
#pragma unroll
      for (int e = 0; e < 4; ++e) v[e] = h0[e];
    }
  }

  // Called once the inputs of step `t` are used: take over the state before step t - 1, which is the next to be
  // computed, and load the inputs of step t - kDepth.
  __device__ __forceinline__ void advance(Ahead& now, int t) {
    h[0] = now.h[0], h[1] = now.h[1];
    fetch(now, t - kDepth);
  }

  // For `Count` gates from `First` on, set `x` to the unscaled projection W_ih x, and the accumulators `c` of the
  // products with W_hh to their start values, the scaled projection and the biases.
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

  // c += W_gate^T d for each row, where `tile` holds d.
  __device__ __forceinline__ void multiply_transposed(float (&c)[4], const Operand& tile, int gate) const {
    const uint32_t from = Tile::fragments(tile);
    float small[4] = {};
#pragma unroll(Tile::kUnroll)
    for (int k = 0; k < Tile::kSteps; ++k) {
      uint32_t a[S::kParts][4], b[S::kParts][2];
      Tile::load_fragment(a, from, k);
      Tile::parts_of(b, weights.transposed[gate], k);
      Tile::multiply_step(c, small, a, b);
    }
    if constexpr (S::kParts == 2) {
#pragma unroll
      for (int e = 0; e < 4; ++e) c[e] += small[e];
    }
  }

  __device__ __forceinline__ static void store(unsigned char* row, int column, const float (&v)[4], int i,
                                               float scale = 1.f) {
    const Pair pair = S::round_pair(scale * v[2 * i], scale * v[2 * i + 1]);
    *reinterpret_cast<Pair*>(row + column * Padded * Tile::kSize) = pair;
  }

  __device__ __forceinline__ void sum_bias(int gate, const float (&v)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) d_bias[gate][e & 1] += v[e];
  }

  // Sum the attention's gradient over the warp's units. `store_attention` sums over warps after the next barrier.
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

  __device__ __forceinline__ void store_attention(const float (&part)[16][kWarps + 1], int t) const {
    if (!p.d_attention || warp != 0 || place != 0) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = 0;
#pragma unroll
      for (int other = 0; other < kWarps; ++other) sum += part[group + 8 * i][other];
      if (t <= last[i]) p.d_attention[attention_start[i] + t * attention_stride] = sum;
    }
  }

  // Equations (10) to (13) and one unit's term of (21), for one value of the thread. Where the step does not exist, the
  // gradients are zero, and `stay`, the part of dh that does not pass through the gates, is all of dh.
  struct Gradient {
    float an, au, stay, d_a;
  };
  __device__ __forceinline__ Gradient gradient(int e, int t, float before, float u, float n, const Ahead& now) const {
    const int i = e >> 1;
    const float2 pair = S::widen_pair(now.dy[i]);
    const float alpha = fmaf(in.cell.alpha1, now.attention[i], in.cell.alpha0);
    const float beta = fmaf(in.cell.beta1, now.attention[i], in.cell.beta0);
    const auto d = step_gradient(dh[e] + (e & 1 ? pair.y : pair.x), before, u, n, alpha, beta);
    const bool valid = t <= last[i];
    const float au = in.cell.keep_side ? -d.au : d.au;
    const float d_a = fmaf(in.cell.beta1, u, in.cell.alpha1) * d.dg;
    return {valid ? d.an : 0.f, valid ? au : 0.f, valid ? d.dh : dh[e], valid ? d_a : 0.f};
  }

  // One step with the reset after the product.
  template <bool Scale>
  __device__ __forceinline__ void step_after(int t, int buffer, Ahead& now, float sign) {
    constexpr bool kTwo = kBuffers == 2;
    auto& exchanged = shared.d[kTwo ? buffer : 0];
    float c[3][4], x[3][4], before[4], x_n[4], ar[4], au[4], an[4], ghn[4], stay[4], d_a[2] = {0, 0};
    state_before(before, h, t);
    start<Scale, 0, 3>(c, x, now);
    const float2 b_hn = *reinterpret_cast<const float2*>(&shared.bias[3][unit]);
#pragma unroll
    for (int e = 0; e < 4; ++e) x_n[e] = c[2][e], c[2][e] = e & 1 ? b_hn.y : b_hn.x;
    Tile::template multiply<0, 3>(c, shared.h[kTwo ? buffer : 0], weights.w);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float r = logistic2(-kLog2E * c[0][e]), u = logistic2(sign * c[1][e]);
      const float n = S::tanh(fmaf(r, c[2][e], x_n[e]));
      const Gradient d = gradient(e, t, before[e], u, n, now);
      an[e] = d.an, au[e] = d.au, stay[e] = d.stay;
      ghn[e] = t <= last[e >> 1] ? d.an * r : 0.f;  // r may be NaN where no step exists
      ar[e] = t <= last[e >> 1] ? reset_gradient(d.an * c[2][e], r) : 0.f;
      d_a[e >> 1] += d.d_a;
      const float scaled = ar[e] * x[0][e] + au[e] * x[1][e] + an[e] * x[2][e];
      if (Scale) d_a[e >> 1] += t <= last[e >> 1] ? scaled : 0.f;
    }
    Tile::share(exchanged[0], ar);
    Tile::share(exchanged[1], au);
    Tile::share(exchanged[2], ghn);
    share_attention(shared.d_attention[buffer], d_a);
    sum_bias(0, ar), sum_bias(1, au), sum_bias(2, an), sum_bias(3, ghn);
    if (kTwo && t > 0) {
      state_before(x_n, now.h, t - 1);
      Tile::share(shared.h[buffer ^ 1], x_n);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (t <= last[i]) {
        const int row = y_start[i] + t * y_stride;
        unsigned char* to = at(gates, row, (Scale ? 6 : 4) * Padded * Tile::kSize);
        store(at(states, row, Padded * Tile::kSize), 0, before, i);
        store(to, Scale ? 2 : 0, ghn, i);
        store(to, Scale ? 0 : 1, ar, i);
        store(to, Scale ? 1 : 2, au, i);
        if (Scale) {
          store(to, 3, ar, i, now.attention[i]);
          store(to, 4, au, i, now.attention[i]);
          store(to, 5, an, i, now.attention[i]);
        } else {
          store(to, 3, an, i);
        }
      }
    }
    advance(now, t);
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
        state_before(x_n, h, t - 1);
        Tile::share(shared.h[0], x_n);
      }
      __syncthreads();
    }
  }

  // Compute r, u and q = r h of step `t`. The state before the step is in shared memory; q is written there too.
  template <bool Scale>
  __device__ __forceinline__ void reset_of(float (&r)[4], float (&u)[4], float (&x)[3][4], const Ahead& now, int t,
                                           float sign) {
    float c[3][4], before[4], q[4];
    start<Scale, 0, 2>(c, x, now);
    Tile::template multiply<0, 2>(c, shared.h[0], weights.w);
    state_before(before, h, t);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      r[e] = logistic2(-kLog2E * c[0][e]), u[e] = logistic2(sign * c[1][e]);
      q[e] = r[e] * before[e];
    }
    Tile::share(shared.q, q);
  }

  // One step with the reset before the product. r, u and q of this step are already known; those of step t - 1 are
  // computed here.
  template <bool Scale>
  __device__ __forceinline__ void step_before(int t, float (&r)[4], float (&u)[4], Ahead& now, const Ahead& next,
                                              float sign) {
    auto& exchanged = shared.d[0];
    float c[3][4], x[3][4], before[4], q[4], ar[4], au[4], an[4], stay[4], d_a[2] = {0, 0};
    state_before(before, h, t);
    start<Scale, 0, 3>(c, x, now);
    Tile::template multiply<2, 1>(c, shared.q, weights.w);
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
      state_before(earlier, now.h, t - 1);
      Tile::share(shared.h[0], earlier);
    }
    const float scale[2] = {now.attention[0], now.attention[1]};
    advance(now, t);
    __syncthreads();
    float dq[4] = {};
    multiply_transposed(dq, exchanged[2], 2);
    multiply_transposed(stay, exchanged[1], 1);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool valid = t <= last[e >> 1];
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
      if (t <= last[i]) {
        const int row = y_start[i] + t * y_stride;
        unsigned char* to = at(gates, row, (Scale ? 6 : 3) * Padded * Tile::kSize);
        unsigned char* state = at(states, row, 2 * Padded * Tile::kSize);
        store(state, 0, before, i);
        store(state, 1, q, i);
        store(to, 0, ar, i);
        store(to, 1, au, i);
        store(to, 2, an, i);
        if (Scale) {
          store(to, 3, ar, i, scale[i]);
          store(to, 4, au, i, scale[i]);
          store(to, 5, an, i, scale[i]);
        }
      }
    }
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
#pragma unroll
    for (int d = 0; d < kDepth; ++d) fetch(ahead[d], longest - 1 - d);
    float first[4], r[4], u[4];
    fetch_state(h, longest - 1);
    state_before(first, h, longest - 1);
    Tile::share(shared.h[0], first);
    __syncthreads();
    if constexpr (Before) {
      float x[3][4];
      reset_of<Scale>(r, u, x, ahead[0], longest - 1, sign);
      __syncthreads();
    }
    const auto step = [&](int t, int buffer, Ahead& now, const Ahead& next) {
      if constexpr (Before) {
        step_before<Scale>(t, r, u, now, next, sign);
      } else {
        step_after<Scale>(t, buffer, now, sign);
      }
    };
    if constexpr (kLarge || S::kParts == 2) {  // two steps in one loop would not fit into registers
#pragma unroll 1
      for (int t = longest - 1; t >= 0; --t) {
        step(t, 0, ahead[0], ahead[kDepth - 1]);
        if constexpr (kDepth == 2) {
          const Ahead later = ahead[0];
          ahead[0] = ahead[1], ahead[1] = later;
        }
      }
    } else {
#pragma unroll 1
      for (int t = longest - 1; t >= 0; t -= 2) {
        step(t, 0, ahead[0], ahead[1]);
        if (t > 0) step(t - 1, 1, ahead[1], ahead[0]);
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

// One block for each multiprocessor is enough. Without this bound, ptxas spills registers in small instances so that
// more blocks fit.
template <class S, int Padded>
__global__ void __launch_bounds__(Tile16<S, Padded>::kThreads, 1) backward16(const Backward p) {
  using Kernel = Backward16<S, Padded>;
  Kernel kernel(p);
  if (kernel.longest > 0) run_form(kernel, p.in.cell);
  kernel.store_sums();
}

}  // namespace dien::cuda
