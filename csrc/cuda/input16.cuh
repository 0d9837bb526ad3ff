// Computes W_ih x inside the forward's loop, for 16-bit storage and at most P inputs. W_ih stays in registers beside
// W_hh. The copy of x to shared memory starts three steps before it is read, and the product for the next step is
// computed while the current step waits for its activations.
#pragma once
#include "tile16.cuh"

namespace dien::cuda {

template <class S, int Padded>
struct Input16 {
  using Tile = Tile16<S, Padded>;
  static constexpr int kSlots = 4;                     // slots of a ring: one is read, the others are being filled
  static constexpr int kPerRow = Tile::kThreads / 16;  // threads that copy a row of x, four inputs each
  using Slots = typename Tile::Operand[kSlots];

  const Tile& tile;
  Slots& slots;
  const float (&bias)[4][Padded];
  typename Tile::Weights w[3];
  float next[3][4];  // biases plus W_ih x of the next step
  const unsigned char* source;
  uint32_t target;
  int length;  // how many steps the thread copies
  int64_t step;

  __device__ __forceinline__ Input16(const Forward& p, const Tile& its, Slots& ring, const float (&biases)[4][Padded])
      : tile(its), slots(ring), bias(biases) {
#pragma unroll
    for (int gate = 0; gate < 3; ++gate) {
      typename Tile::Raw raw;
      tile.template load_factor<false>(raw, gate, p.w_ih, p.input);
      Tile::split(w[gate], raw);
    }
    const int i = threadIdx.x / kPerRow, column = threadIdx.x % kPerRow * 4;
    const Row row = tile.row(i);
    length = column < p.input ? row.length : 0;
    source = static_cast<const unsigned char*>(p.in.projection) + (row.x * p.input + column) * Tile::kSize;
    step = strides_of(p.in.rows).x * p.input * Tile::kSize;
    target = shared_address(slots[0][0] + i * Tile::kStride + column * Tile::kSize);
#pragma unroll
    for (int t = 0; t < kSlots; ++t) copy(t);
    wait();
    __syncthreads();
    prepare(0);
    __syncthreads();  // all warps have read the slot of step 0, which may now be overwritten
  }

  // Start to copy step `t` into its slot. Past the row's end nothing is copied; the slot's old values are not used.
  __device__ __forceinline__ void copy(int t) {
    if (t < length) {
      const uint32_t slot = (t & (kSlots - 1)) * uint32_t(sizeof(slots[0]));
      asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(target + slot), "l"(source) : "memory");
      source += step;
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  // Wait until the thread's copies have arrived, except for those of the last two steps. Before a thread reads what
  // other threads have copied, a barrier must follow.
  __device__ __forceinline__ static void wait() { asm volatile("cp.async.wait_group 2;" ::: "memory"); }

  __device__ __forceinline__ void prepare(int t) {
#pragma unroll
    for (int gate = 0; gate < 3; ++gate) {
      const float2 b = *reinterpret_cast<const float2*>(&bias[gate][tile.unit]);
#pragma unroll
      for (int e = 0; e < 4; ++e) next[gate][e] = e & 1 ? b.y : b.x;
    }
    tile.template multiply<0, 3>(next, slots[t & (kSlots - 1)], w);
  }

  __device__ __forceinline__ static void finish() { asm volatile("cp.async.wait_all;" ::: "memory"); }
};

}  // namespace dien::cuda
