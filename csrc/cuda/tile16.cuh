// A tile of 16 rows: which thread has which values, and the products with W_hh.
//
// A warp owns 8 units for all three gates, so that r, u and n of a unit are in the same thread. Lane 4 g + q (group g,
// place q) has four values of each, in this order: of row g units 2q and 2q + 1, and of row g + 8 the same two units.
#pragma once
#include <type_traits>

#include "tile.cuh"

namespace dien::cuda {

template <class S, int Padded>
struct Tile16 {
  using Element = typename S::Element;
  using Pair = typename S::Pair;
  static constexpr int kSize = int(sizeof(Element));
  static constexpr int kParts = S::kParts;
  static constexpr int kThreads = Padded / 8 * 32;
  static constexpr int kBytes = (Padded * kSize + 31) / 32 * 32;           // of one row of an operand
  static constexpr int kSteps = kBytes / 32;                               // matrix instructions along a row
  static constexpr int kUnroll = kParts == 2 && Padded > 64 ? 1 : kSteps;  // weights read ahead would take registers
  static constexpr int kStride = kBytes + 16;  // an odd multiple of 16, so that ldmatrix has no bank conflict

  using Operand = unsigned char[kParts][16 * kStride];  // the left factor in shared memory; past P it stays zero
  using Weights = uint32_t[kSteps][kParts][2];          // a thread's fragments of one gate's right factor
  using Raw = uint32_t[kSteps][2];                      // the same, not yet split into parts

  // Where registers cannot hold the weights, each step reads them from shared memory or, where that is too small, from
  // the cache. A warp reads 256 contiguous bytes, because the host has stored the weights in the order of threads.
  static constexpr bool kStreamed = kParts == 2 && Padded > 64;
  static constexpr int kGateFragments = kSteps * kThreads;
  struct Streamed {  // the right factor of one gate
    const uint2* at;
    __device__ __forceinline__ void load(uint32_t (&parts)[kParts][2], int k) const {
      parts_of(parts, at[k * kThreads]);
    }
  };

  const int lane, warp, group, place;
  const int unit;  // the first of the thread's two units
  const Inputs& in;
  int64_t first;   // the place of the tile's first row in the kernel's order
  const int rows;  // 16, or 8 if the last eight rows do not exist

  __device__ __forceinline__ explicit Tile16(const Inputs& inputs) : Tile16(inputs, int64_t(blockIdx.x) * 16, 16) {}
  __device__ __forceinline__ Tile16(const Inputs& inputs, int64_t first_row, int count, int thread = threadIdx.x)
      : lane(thread & 31),
        warp(thread >> 5),
        group(lane >> 2),
        place(lane & 3),
        unit(warp * 8 + 2 * place),
        in(inputs),
        first(first_row),
        rows(count) {}

  __device__ __forceinline__ Row row(int i) const { return row_at(in.rows, i < rows ? first + i : in.rows.batch); }

  // Whether the row and unit of a thread's `e`-th value exist, and where that value is in a [batch, H] tensor. This is
  // looked up before and again after the loop, because keeping it would take registers in the loop.
  __device__ __forceinline__ bool exists(int e) const {
    return 8 * (e >> 1) < rows && place_of(e) < in.rows.batch && unit + (e & 1) < in.cell.hidden;
  }
  __device__ __forceinline__ int64_t place_of(int e) const { return first + group + 8 * (e >> 1); }
  __device__ __forceinline__ int64_t state_at(int e) const { return cuda::state_at(in, place_of(e), unit + (e & 1)); }

  // Whether a gate is read. AGRU's update gate is not; its weights and bias count as zero, so that a NaN has no effect.
  __device__ __forceinline__ bool used(int gate) const {
    return gate != 1 || in.cell.beta0 != 0.f || in.cell.beta1 != 0.f;
  }

  __device__ __forceinline__ float bias(const float* b, int gate, int j) const {
    return b && unit + j < in.cell.hidden ? b[gate * in.cell.hidden + unit + j] : 0.f;
  }

  // Write the biases that are added to W_ih x (0 to 2) and to gh_n (3) to shared memory.
  __device__ __forceinline__ void share_biases(float (&biases)[4][Padded]) const {
    if (lane >= 4) return;  // four lanes write those of the warp's eight units
    const bool before = in.cell.reset_before;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int gate = 0; gate < 3; ++gate) {
        const float b = bias(in.b_ih, gate, j) + (gate < 2 || before ? bias(in.b_hh, gate, j) : 0.f);
        biases[gate][unit + j] = used(gate) ? b : 0.f;
      }
      biases[3][unit + j] = before ? 0.f : bias(in.b_hh, 2, j);
    }
  }

  // An element of a [3H, columns] matrix; zero outside of it.
  __device__ __forceinline__ Element weight(int gate, int row, int column, const void* from, int columns) const {
    const bool inside = used(gate) && row < in.cell.hidden && column < columns;
    return inside ? static_cast<const Element*>(from)[(int64_t(gate) * in.cell.hidden + row) * columns + column]
                  : S::round(0.f);
  }
  __device__ __forceinline__ Element weight(int gate, int row, int column) const {  // of W_hh
    return weight(gate, row, column, in.w_hh, in.cell.hidden);
  }

  // Load the right factor of one gate for the warp's units, its columns: W_gate^T for the product W_gate h or, if
  // `Transposed`, W_gate for W_gate^T d.
  template <bool Transposed>
  __device__ __forceinline__ void load_weights(Raw& w, int gate) const {
    load_factor<Transposed>(w, gate, in.w_hh, in.cell.hidden);
  }

  // The same for any [3H, columns] matrix `from`.
  template <bool Transposed>
  __device__ __forceinline__ void load_factor(Raw& w, int gate, const void* from, int columns) const {
    const int own = warp * 8 + group;
    constexpr int kPerWord = 4 / kSize;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Element value[kPerWord];
#pragma unroll
        for (int j = 0; j < kPerWord; ++j) {
          const int other = (k * 8 + half * 4 + place) * kPerWord + j;
          value[j] = Transposed ? weight(gate, other, own, from, columns) : weight(gate, own, other, from, columns);
        }
        memcpy(&w[k][half], value, 4);
      }
    }
  }

  __device__ __forceinline__ static void split(Weights& w, const Raw& raw) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t parts[kParts];
        S::split(parts, raw[k][half]);
#pragma unroll
        for (int part = 0; part < kParts; ++part) w[k][part][half] = parts[part];
      }
    }
  }

  // Write a thread's four values to shared memory as part of an operand. In float32 two threads use the same bank at a
  // time, because rows are spaced for ldmatrix, which runs more often.
  template <int Halves = 2>
  __device__ __forceinline__ void share(Operand& tile, const float (&v)[4]) const {
#pragma unroll
    for (int i = 0; i < Halves; ++i) {
      const int at = (group + 8 * i) * kStride + unit * kSize;
      if constexpr (kParts == 1) {
        *reinterpret_cast<uint32_t*>(tile[0] + at) = S::round_pair(v[2 * i], v[2 * i + 1]);
      } else {
        uint32_t first[2], second[2];
        S::split(first, bits_of(v[2 * i]));
        S::split(second, bits_of(v[2 * i + 1]));
#pragma unroll
        for (int part = 0; part < 2; ++part)
          *reinterpret_cast<uint2*>(tile[part] + at) = make_uint2(first[part], second[part]);
      }
    }
  }

  __device__ __forceinline__ uint32_t fragments(const Operand& tile) const {
    return shared_address(&tile[0][(lane & 15) * kStride + (lane >> 4) * 16]);
  }

  __device__ __forceinline__ static void load_fragment(uint32_t (&a)[kParts][4], uint32_t from, int k) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) load_matrix_x4(a[part], from + part * 16 * kStride + k * 32);
  }

  // c += a w for one step of the product. Products with a low part are summed in `small`, which is more accurate and
  // makes the chains of dependent instructions shorter.
  __device__ __forceinline__ static void multiply_step(float (&c)[4], float (&small)[4], const uint32_t (&a)[kParts][4],
                                                       const uint32_t (&w)[kParts][2]) {
    S::multiply(c, a[0], w[0][0], w[0][1]);
    if constexpr (kParts == 2) {
      S::multiply(small, a[1], w[0][0], w[0][1]);
      S::multiply(small, a[0], w[1][0], w[1][1]);
    }
  }

  __device__ __forceinline__ static void parts_of(uint32_t (&parts)[kParts][2], const Weights& w, int k) {
    memcpy(parts, w[k], sizeof(parts));
  }
  __device__ __forceinline__ static void parts_of(uint32_t (&parts)[kParts][2], uint2 raw) {
    const uint32_t words[2] = {raw.x, raw.y};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t word = words[half], split[kParts];
      if constexpr (kParts == 2) asm volatile("" : "+r"(word));  // keeps the split in the loop, to save registers
      S::split(split, word);
#pragma unroll
      for (int part = 0; part < kParts; ++part) parts[part][half] = split[part];
    }
  }
  __device__ __forceinline__ static void parts_of(uint32_t (&parts)[kParts][2], const Raw& w, int k) {
    parts_of(parts, make_uint2(w[k][0], w[k][1]));
  }
  template <class Factor>
  __device__ __forceinline__ static void parts_of(uint32_t (&parts)[kParts][2], const Factor& w, int k) {
    w.load(parts, k);
  }

  // c[gate] += tile w[gate], for `Count` gates from `First` on.
  template <int First, int Count, class Factor>
  __device__ __forceinline__ void multiply(float (&c)[3][4], const Operand& tile, const Factor (&w)[3]) const {
    const uint32_t from = fragments(tile);
    float small[3][4] = {};
#pragma unroll(std::is_same_v<Factor, Streamed> ? 2 : kUnroll)
    for (int k = 0; k < kSteps; ++k) {
      uint32_t a[kParts][4];
      load_fragment(a, from, k);
#pragma unroll
      for (int gate = First; gate < First + Count; ++gate) {
        uint32_t b[kParts][2];
        parts_of(b, w[gate], k);
        multiply_step(c[gate], small[gate], a, b);
      }
    }
    if constexpr (kParts == 2) {
#pragma unroll
      for (int gate = First; gate < First + Count; ++gate)
#pragma unroll
        for (int e = 0; e < 4; ++e) c[gate][e] += small[gate][e];
    }
  }
};

}  // namespace dien::cuda
