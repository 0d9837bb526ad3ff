// Where the backward keeps W_hh and its transpose. Registers hold both up to 64 units, in float32 up to 40.
#pragma once
#include "tile16.cuh"

namespace dien::cuda {

extern __shared__ __align__(16) unsigned char dynamic_memory[];

enum class Home {
  kRegisters,
  kHalf,      // W_hh in registers; the transpose in shared memory, as each thread's own fragments
  kMatrix,    // one copy of W_hh in shared memory for both, because ldmatrix can transpose 16-bit elements
  kStreamed,  // both in global memory, as fragments, which each step reads from the L2 cache
};

template <class S, int Padded>
constexpr Home kHome = Padded > 64                     ? S::kParts == 1 ? Home::kMatrix : Home::kStreamed
                       : S::kParts == 2 && Padded > 40 ? Home::kHalf
                                                       : Home::kRegisters;

// `w` and `transposed` are the right factors of each gate in a form that Tile16::parts_of takes. kBytes is the dynamic
// shared memory that they need.
template <class S, int Padded, Home = kHome<S, Padded>>
struct BackwardWeights {
  using Tile = Tile16<S, Padded>;
  static constexpr int kBytes = 0;
  typename Tile::Raw w[3], transposed[3];

  __device__ __forceinline__ BackwardWeights(const Tile& tile, const void*) {
#pragma unroll
    for (int gate = 0; gate < 3; ++gate) {
      tile.template load_weights<false>(w[gate], gate);
      tile.template load_weights<true>(transposed[gate], gate);
    }
  }
};

template <class S, int Padded>
struct BackwardWeights<S, Padded, Home::kHalf> {
  using Tile = Tile16<S, Padded>;
  static constexpr int kBytes = 3 * Tile::kSteps * Tile::kThreads * 8;

  struct Own {
    int gate;
    __device__ __forceinline__ uint2* at(int k) const {
      return reinterpret_cast<uint2*>(dynamic_memory) + (gate * Tile::kSteps + k) * Tile::kThreads + threadIdx.x;
    }
    __device__ __forceinline__ void load(uint32_t (&parts)[S::kParts][2], int k) const {
      Tile::parts_of(parts, *at(k));
    }
  };
  typename Tile::Raw w[3];
  const Own transposed[3] = {{0}, {1}, {2}};

  __device__ __forceinline__ BackwardWeights(const Tile& tile, const void*) {
#pragma unroll
    for (int gate = 0; gate < 3; ++gate) {
      typename Tile::Raw raw;
      tile.template load_weights<false>(w[gate], gate);
      tile.template load_weights<true>(raw, gate);
#pragma unroll
      for (int k = 0; k < Tile::kSteps; ++k) *Own{gate}.at(k) = make_uint2(raw[k][0], raw[k][1]);
    }
  }
};

template <class S, int Padded>
struct BackwardWeights<S, Padded, Home::kMatrix> {
  using Tile = Tile16<S, Padded>;
  static constexpr int kChunks = Padded * 2 / 16;  // chunks of 16 bytes in a row
  // After every kGap rows 16 bytes are left free, so that the eight rows of an ldmatrix have no bank conflict.
  static constexpr int kGap = kChunks % 8 == 0 ? 1 : kChunks % 4 == 0 ? 2 : 4;
  static_assert(kChunks % 2 == 0, "an even number of chunks needs a gap after each four rows at least");
  static constexpr int kGate = (Padded * kChunks + Padded / kGap) * 16;
  static constexpr int kBytes = 3 * kGate;

  __device__ __forceinline__ static int place(int row, int chunk) { return (row * kChunks + row / kGap + chunk) * 16; }

  template <bool Transposed>
  struct Matrix {
    uint32_t from;
    __device__ __forceinline__ void load(uint32_t (&parts)[1][2], int k) const {
      if constexpr (Transposed) {
        load_matrix_x2_transposed(parts[0], from + k * (16 * kChunks + 16 / kGap) * 16);
      } else {
        load_matrix_x2(parts[0], from + k * 32);
      }
    }
  };
  Matrix<false> w[3];
  Matrix<true> transposed[3];

  __device__ __forceinline__ BackwardWeights(const Tile& tile, const void*) {
    for (int at = threadIdx.x; at < 3 * Padded * (Padded / 2); at += Tile::kThreads) {
      const int row = at / (Padded / 2), column = at % (Padded / 2) * 2;
      typename Tile::Element pair[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) pair[j] = tile.weight(row / Padded, row % Padded, column + j);
      memcpy(dynamic_memory + place(row, 0) + column * 2, pair, 4);
    }
    const int lane = tile.lane;
#pragma unroll
    for (int gate = 0; gate < 3; ++gate) {
      const uint32_t start = shared_address(dynamic_memory) + gate * kGate;
      w[gate].from = start + place(tile.warp * 8 + (lane & 7), lane >> 3 & 1);
      transposed[gate].from = start + place(lane & 15, tile.warp);
    }
  }
};

template <class S, int Padded>
struct BackwardWeights<S, Padded, Home::kStreamed> {
  using Tile = Tile16<S, Padded>;
  static constexpr int kBytes = 0;

  struct Streamed {
    const uint2* from;
    __device__ __forceinline__ void load(uint32_t (&parts)[S::kParts][2], int k) const {
      Tile::parts_of(parts, __ldg(from + k * Tile::kThreads));
    }
  };
  Streamed w[3], transposed[3];

  __device__ __forceinline__ BackwardWeights(const Tile&, const void* fragments) {
    const uint2* from = static_cast<const uint2*>(fragments) + threadIdx.x;
#pragma unroll
    for (int gate = 0; gate < 3; ++gate) {
      w[gate].from = from + gate * Tile::kSteps * Tile::kThreads;
      transposed[gate].from = from + (3 + gate) * Tile::kSteps * Tile::kThreads;
    }
  }
};

}  // namespace dien::cuda
