// The forward on tiles of 16 rows, one barrier a step (two with the reset before the product).
//
// The state is float32 in registers. The product reads a rounded copy of it in shared memory. There are two buffers for
// it, so that a fast warp can write the next step's copy while slower ones still read this step's.
//
// A tile may have only 8 rows. The products then take as long as for 16, but the activations, the longer part of a
// step, take half the time.
#pragma once
#include "input16.cuh"

namespace dien::cuda {

// The rows of a block: 16, 8 or none.
struct BlockRows {
  int64_t first;
  int rows;
};

// Rows come longest first, and the longest ones decide when a batch ends. Those with more than two thirds of the
// longest row's steps run in tiles of 8 rows, as a step of 8 rows takes about two thirds of the time of one of 16. If
// there are more of them than `tiles_of_8` tiles hold, all tiles have 16 rows: each multiprocessor then has so many
// long rows that only its throughput counts. If all rows of the batch fit into these tiles, all tiles have 8 rows.
template <bool HasTilesOf8>
__device__ __forceinline__ BlockRows rows_of_block(const Forward& p) {
  const int64_t batch = p.in.rows.batch, most = HasTilesOf8 ? int64_t(p.tiles_of_8) * 8 : 0;
  int64_t split = most > 0 ? (batch + 15) / 16 * 16 : 0;  // rows before this one run in tiles of 8
  if (most > 0 && batch > most) {
    const int64_t every = (most / (16 * int(blockDim.x)) + 1) * 16, at = threadIdx.x * every;
    const int longest = row_at(p.in.rows, 0).length;
    split = __syncthreads_count(3 * int64_t(row_at(p.in.rows, at).length) > 2 * int64_t(longest)) * every;
    if (split > most) split = 0;
  }
  BlockRows block{split + (int64_t(blockIdx.x) - split / 8) * 16, 16};
  if (HasTilesOf8 && int64_t(blockIdx.x) * 8 < split) block = {int64_t(blockIdx.x) * 8, 8};
  if (block.first >= batch) block.rows = 0;
  return block;
}

template <class S, int Padded>
struct Forward16 : Tile16<S, Padded> {
  using Tile = Tile16<S, Padded>;
  using Input = Input16<S, Padded>;
  using Tile::group, Tile::unit, Tile::in;
  using typename Tile::Element, typename Tile::Pair;
  static constexpr bool kFuses = S::kParts == 1 && Padded <= 64;
  // In 16 bits above 64 units, W_hh leaves no registers for a second loop; there, forward8.cuh has the tiles of 8 rows.
  static constexpr bool kHasTilesOf8 = Padded <= 64 || Tile::kStreamed;
  struct Nothing {};
  // The number of blocks that must fit on a multiprocessor. In a kernel with a fused loop the compiler would otherwise
  // use so many registers that only one fits.
  static constexpr int kResident = kFuses ? 512 / Tile::kThreads : 1;
  // How many steps ahead inputs are loaded: two where a step is shorter than a load, one where a long step needs the
  // registers. In a fused loop these inputs are the attention alone, whose values are neighbours in memory.
  template <class From>
  static constexpr int kDepth = kFuses && std::is_same_v<From, Nothing> ? 2 : 1;

  struct Ring {
    alignas(16) typename Input::Slots slots;
    BlockRows block;  // kept here until the end of the kernel, because registers are scarce
  };
  struct Shared : std::conditional_t<kFuses, Ring, Nothing> {
    alignas(16) typename Tile::Operand h[2];  // with the reset before the product, h[0] is h and h[1] is r h
    alignas(16) float bias[4][Padded];
  };

  // The inputs of a step that a thread loads ahead.
  struct Ahead {
    Pair gate[2][3];
    float attention[2];
  };

  Shared& shared;
  const float& update;  // Forward::update; read from the kernel's parameters, it takes no register
  std::conditional_t<Tile::kStreamed, typename Tile::Streamed, typename Tile::Weights> w[3];
  float h[4] = {0, 0, 0, 0};
  const unsigned char* projection[2];
  const float* attention[2];
  Element* y[2];
  int length[2];  // 0 in threads of padded units, whose state stays zero and is not stored
  int longest = 0;
  int64_t projection_step, attention_step, y_step;
  Ahead ahead[2];

  __device__ __forceinline__ Forward16(const Forward& p, const BlockRows& block, Shared& memory)
      : Tile(p.in, block.first, block.rows), shared(memory), update(p.update) {
    load_weights(p);
    clear(shared);  // its barrier also separates the loads of weights, which take many registers, from the rest
    const Strides strides = strides_of(in.rows);
    constexpr int64_t kWidth = 3 * Padded * Tile::kSize;
    projection_step = strides.x * kWidth;
    attention_step = in.attention ? strides.attention : 0;
    y_step = p.y ? strides.y * in.cell.hidden : 0;  // without y, every step writes to the place of the last state
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Row row = Tile::row(group + 8 * i);
      longest = max(longest, row.length);
      length[i] = unit < in.cell.hidden ? row.length : 0;
      const int64_t x = row.length > 0 ? row.x : 0;  // a row without steps may start past the end of x
      projection[i] = static_cast<const unsigned char*>(in.projection) + x * kWidth + unit * Tile::kSize;
      attention[i] = in.attention && row.length > 0 ? in.attention + row.attention : kNothing;
      y[i] = static_cast<Element*>(p.y ? p.y : p.h_n) + (p.y ? row.y : row.index) * in.cell.hidden + unit;
    }
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) longest = max(longest, __shfl_xor_sync(~0u, longest, lanes));
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (in.h0 && Tile::exists(e)) h[e] = in.h0[Tile::state_at(e)];
    }
    Tile::share(shared.h[0], h);
    Tile::share_biases(shared.bias);
    if constexpr (kFuses) {
      if (threadIdx.x == 0) shared.block = block;
    }
    __syncthreads();
  }

  __device__ __forceinline__ void load_weights(const Forward& p) {
    if constexpr (Tile::kStreamed) {
      extern __shared__ uint2 resident[];
      const auto* streamed = static_cast<const uint2*>(p.streamed) + threadIdx.x;
      for (int i = 0; i < p.resident * Tile::kGateFragments; i += Tile::kThreads)
        resident[threadIdx.x + i] = streamed[i];  // only this thread reads them, so no barrier is needed
#pragma unroll
      for (int gate = 0; gate < 3; ++gate)
        w[gate].at = (gate < p.resident ? resident + threadIdx.x : streamed) + gate * Tile::kGateFragments;
    } else {
#pragma unroll
      for (int gate = 0; gate < 3; ++gate) {
        typename Tile::Raw raw;
        Tile::template load_weights<false>(raw, gate);
        Tile::split(w[gate], raw);
      }
    }
  }

  // Load the inputs of step `t`. Past a row's end its last step is loaded again, and not used.
  template <int Halves, bool Projected>
  __device__ __forceinline__ void fetch(Ahead& to, int t) {
#pragma unroll
    for (int i = 0; i < Halves; ++i) {
#pragma unroll
      for (int gate = 0; gate < 3 * Projected; ++gate)
        to.gate[i][gate] = *reinterpret_cast<const Pair*>(projection[i] + gate * Padded * Tile::kSize);
      to.attention[i] = *attention[i];
      if (t + 1 < length[i]) {
        if (Projected) projection[i] += projection_step;
        attention[i] += attention_step;
      }
    }
  }

  // Set the accumulators `c` of the products with W_hh to their start values. With the reset after the product, W_in x
  // goes to `x_n` instead, because the reset gate does not multiply it.
  template <bool Before, bool Scale, int Halves>
  __device__ __forceinline__ void start(float (&c)[3][4], float (&x_n)[4], const Ahead& now, const float (&b_hn)[2]) {
#pragma unroll
    for (int i = 0; i < Halves; ++i) {
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
  }

  // One step. `From` is `Nothing` if the projection was computed before the kernel, and `Input` if the loop does so.
  template <bool Before, bool Scale, int Halves, class From>
  __device__ __forceinline__ void step(int t, int buffer, Ahead& now, From& input, const float (&b_hn)[2]) {
    constexpr bool kProjected = std::is_same_v<From, Nothing>;
    float c[3][4] = {}, x_n[4];
    if constexpr (kProjected) {
      start<Before, Scale, Halves>(c, x_n, now, b_hn);
    } else {
      const float2 b = *reinterpret_cast<const float2*>(&shared.bias[3][unit]);
#pragma unroll
      for (int e = 0; e < 2 * Halves; ++e)
        c[0][e] = input.next[0][e], c[1][e] = input.next[1][e], c[2][e] = e & 1 ? b.y : b.x, x_n[e] = input.next[2][e];
    }
    float alpha[2], beta[2];
#pragma unroll
    for (int i = 0; i < Halves; ++i) {
      alpha[i] = fmaf(in.cell.alpha1, now.attention[i], in.cell.alpha0);
      beta[i] = fmaf(in.cell.beta1, now.attention[i], in.cell.beta0);
    }
    fetch<Halves, kProjected>(now, t + kDepth<From>);
    if constexpr (!kProjected) input.copy(t + Input::kSlots);
    float r[4];
    Tile::template multiply<0, Before ? 2 : 3>(c, shared.h[Before ? 0 : buffer], w);
    if constexpr (!kProjected) input.prepare(t + 1);
#pragma unroll
    for (int e = 0; e < 2 * Halves; ++e) r[e] = logistic2(-kLog2E * c[0][e]);
    if constexpr (Before) {
      float q[4];
#pragma unroll
      for (int e = 0; e < 2 * Halves; ++e) q[e] = r[e] * h[e];
      Tile::template share<Halves>(shared.h[1], q);
      __syncthreads();
      Tile::template multiply<2, 1>(c, shared.h[1], w);
    }
#pragma unroll
    for (int e = 0; e < 2 * Halves; ++e) {
      const int i = e >> 1;
      const float u = logistic2(update * c[1][e]);
      const float n = S::tanh(Before ? c[2][e] : fmaf(r[e], c[2][e], x_n[e]));
      const float next = next_state(h[e], u, n, alpha[i], beta[i]);
      h[e] = t < length[i] ? next : h[e];
    }
    Tile::template share<Halves>(shared.h[Before ? 0 : buffer ^ 1], h);
#pragma unroll
    for (int i = 0; i < Halves; ++i) {
      if (t < length[i]) *reinterpret_cast<Pair*>(y[i]) = S::round_pair(h[2 * i], h[2 * i + 1]);
      y[i] += y_step;
    }
    if constexpr (!kProjected) Input::wait();
    __syncthreads();
  }

  template <bool Before, bool Scale, int Halves, class From>
  __device__ __forceinline__ void loop(From& input) {
    const float b_hn[2] = {shared.bias[3][unit], shared.bias[3][unit + 1]};
#pragma unroll
    for (int d = 0; d < kDepth<From>; ++d) fetch<Halves, std::is_same_v<From, Nothing>>(ahead[d], d);
#pragma unroll 1
    for (int t = 0; t < longest; t += 2) {
      step<Before, Scale, Halves>(t, 0, ahead[0], input, b_hn);
      if (t + 1 < longest) step<Before, Scale, Halves>(t + 1, 1, ahead[kDepth<From> - 1], input, b_hn);
    }
  }

  template <bool Before, bool Scale>
  __device__ __forceinline__ void run() {
    Nothing nothing;
    if constexpr (kHasTilesOf8) {
      if (Tile::rows == 8) return loop<Before, Scale, 1>(nothing);
    }
    loop<Before, Scale, 2>(nothing);
  }

  __device__ __forceinline__ void run_fused(const Forward& p) {
    Input input(p, *this, shared.slots, shared.bias);
    Tile::rows == 8 ? loop<false, false, 1>(input) : loop<false, false, 2>(input);
    Input::finish();
  }

  __device__ __forceinline__ void store_last(const Forward& p) const {
    BlockRows block;
    if constexpr (kFuses) {
      block = shared.block;
    } else {
      block = rows_of_block<kHasTilesOf8>(p);
    }
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));  // hides its value: what depends on it is computed here, not kept during the loop
    const Tile tile(in, block.first, block.rows, thread);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (tile.exists(e)) static_cast<Element*>(p.h_n)[tile.state_at(e)] = S::round(h[e]);
    }
  }
};

template <class S, int Padded>
__global__ void __launch_bounds__(Tile16<S, Padded>::kThreads, Forward16<S, Padded>::kResident)
    forward16(const Forward p) {
  using Kernel = Forward16<S, Padded>;
  __shared__ typename Kernel::Shared shared;
  const BlockRows block = rows_of_block<Kernel::kHasTilesOf8>(p);
  if (block.rows == 0) return;
  Kernel kernel(p, block, shared);
  if constexpr (Kernel::kFuses) {
    p.w_ih ? kernel.run_fused(p) : run_form(kernel, p.in.cell);
  } else {
    run_form(kernel, p.in.cell);
  }
  kernel.store_last(p);
}

}  // namespace dien::cuda
