// Small matrix products on register tiles. Included inside an instruction set's namespace.
//
// Every product sums over k in ascending order in one chain per element, whatever the tile, so that a row's result
// never depends on which rows it was computed beside.

// Rows a tile holds at most: MR * 3 accumulators, 3 operands and a broadcast must fit the register file.
#ifndef DIEN_TILE_ROWS
#error "the instruction set's file defines DIEN_TILE_ROWS"
#endif

constexpr int64_t kTransposedDepth = 96;  // terms of a transposed product that are summed at a time

// Calls f<rows>(first) for tiles that cover rows 0..n.
template <int MR, class F>
DIEN_INLINE void for_row_tiles(int64_t n, int64_t first, F&& f) {
  for (; first + MR <= n; first += MR) f.template operator()<MR>(first);
  if constexpr (MR > 1) {
    if (first < n) for_row_tiles<MR / 2>(n, first, f);
  }
}

template <class F>
DIEN_INLINE void for_row_tiles(int64_t n, F&& f) {
  for_row_tiles<DIEN_TILE_ROWS>(n, 0, f);
}

// acc[i][v] += sum_k a[i * lda + k] * b[(k * NV + v) * N ..]
template <class L, int M, int NV, class T = typename L::Scalar>
DIEN_INLINE void multiply(const T* a, int64_t lda, const T* b, int64_t depth, typename L::V (&acc)[M][NV]) {
  for (int64_t k = 0; k < depth; ++k, b += NV * L::N) {
    typename L::V w[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) w[v] = L::load(b + v * L::N);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const T s = a[i * lda + k];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[i][v] += s * w[v];
    }
  }
}

// acc[i][v] += sum_k a[k * lda + i] * b[k * ldb + v * N ..]: the transposed product of weight gradients.
template <class L, int M, int NV, class T = typename L::Scalar>
DIEN_INLINE void multiply_transposed(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth,
                                     typename L::V (&acc)[M][NV]) {
  for (int64_t k = 0; k < depth; ++k, a += lda, b += ldb) {
    typename L::V w[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) w[v] = L::load(b + v * L::N);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const T s = a[i];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[i][v] += s * w[v];
    }
  }
}

template <class L, int M, int NV, class T = typename L::Scalar>
DIEN_INLINE void load_tile(const T* p, int64_t row, typename L::V (&acc)[M][NV]) {
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[i][v] = L::load(p + i * row + v * L::N);
}

template <class L, int M, int NV, class T = typename L::Scalar>
DIEN_INLINE void store_tile(T* p, int64_t row, const typename L::V (&acc)[M][NV]) {
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) L::store(p + i * row + v * L::N, acc[i][v]);
}

template <class L, int M, int NV, class T = typename L::Scalar>
DIEN_INLINE void add_tile(T* p, int64_t row, const typename L::V (&acc)[M][NV]) {
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) L::store(p + i * row + v * L::N, L::load(p + i * row + v * L::N) + acc[i][v]);
}

// As store_tile, but each vector of a row goes to its own gate segment.
template <class L, int M, int NV, class T = typename L::Scalar>
DIEN_INLINE void store_gates(T* p, int64_t row, int64_t segment, const typename L::V (&acc)[M][NV]) {
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) L::store(p + i * row + v * segment, acc[i][v]);
}

// Calls f<vectors>(first) for column tiles of at most three vectors that cover `vectors` of them. Four are twice two: a
// tile of one vector has too few sums to keep the multipliers busy.
template <class F>
DIEN_INLINE void for_column_tiles(int64_t vectors, F&& f) {
  int64_t v = 0;
  for (; vectors - v >= 3 && vectors - v != 4; v += 3) f.template operator()<3>(v);
  for (; vectors - v > 2; v += 2) f.template operator()<2>(v);
  if (vectors - v == 2) f.template operator()<2>(v);
  if (vectors - v == 1) f.template operator()<1>(v);
}

// c[i][..] (+)= sum over segments g and k < depth of a[i][g * segment + k] b[g * depth + k][..], b by `pack_columns`.
template <class L, bool kAccumulate, class T = typename L::Scalar>
DIEN_NOINLINE void product(const T* a, int64_t lda, int segments, int64_t segment, const T* packed, int64_t depth,
                           int64_t vectors, int64_t rows, T* c, int64_t ldc) {
  for_column_tiles(vectors, [&]<int NV>(int64_t v) {
    const T* b = packed + v * L::N * depth * segments;
    for_row_tiles(rows, [&]<int M>(int64_t i) {
      typename L::V acc[M][NV] = {};
      if constexpr (kAccumulate) load_tile<L>(c + i * ldc + v * L::N, ldc, acc);
      for (int g = 0; g < segments; ++g)
        multiply<L>(a + i * lda + g * segment, lda, b + g * depth * NV * L::N, depth, acc);
      store_tile<L>(c + i * ldc + v * L::N, ldc, acc);
    });
  });
}

// c[i][..] = start[i][..] + sum_k a[i][k] b[k][..], b by `pack_columns`; with start_row = 0 all rows start alike.
template <class L, class T = typename L::Scalar>
DIEN_NOINLINE void affine(const T* a, int64_t lda, const T* packed, int64_t depth, const T* start, int64_t start_row,
                          int64_t vectors, int64_t rows, T* c, int64_t ldc) {
  for_column_tiles(vectors, [&]<int NV>(int64_t v) {
    const T* b = packed + v * L::N * depth;
    for_row_tiles(rows, [&]<int M>(int64_t i) {
      typename L::V acc[M][NV];
      load_tile<L>(start + i * start_row + v * L::N, start_row, acc);
      multiply<L>(a + i * lda, lda, b, depth, acc);
      store_tile<L>(c + i * ldc + v * L::N, ldc, acc);
    });
  });
}

// c[m][..] += sum_k a[k][m] b[k][..] for m < rows, over `tokens` values of k. Every step of k reads other cache lines, so k is
// cut into pieces whose lines stay in the first-level cache for all m; each piece sums by itself before it is added, and
// short chains round less than a long one.
template <class L, class T = typename L::Scalar>
DIEN_NOINLINE void product_transposed(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t tokens, int64_t rows,
                                      int64_t vectors, T* c, int64_t ldc) {
  for (int64_t first = 0; first < tokens; first += kTransposedDepth) {
    const int64_t depth = tokens - first < kTransposedDepth ? tokens - first : kTransposedDepth;
    for_column_tiles(vectors, [&]<int NV>(int64_t v) {
      for_row_tiles(rows, [&]<int M>(int64_t m) {
        typename L::V acc[M][NV] = {};
        multiply_transposed<L>(a + first * lda + m, lda, b + first * ldb + v * L::N, ldb, depth, acc);
        add_tile<L>(c + m * ldc + v * L::N, ldc, acc);
      });
    });
  }
}

// out[..] += the sum of the rows of a.
template <class L, class T = typename L::Scalar>
DIEN_NOINLINE void add_column_sums(const T* a, int64_t lda, int64_t rows, int64_t padded, T* out) {
  for (int64_t j = 0; j < padded; j += L::N) {
    typename L::V sum{};
    for (int64_t i = 0; i < rows; ++i) sum += L::load(a + i * lda + j);
    L::store(out + j, L::load(out + j) + sum);
  }
}
