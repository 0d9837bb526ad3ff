// Small matrix products on register tiles. Included inside an instruction set's namespace.
//
// Every product sums over k in ascending order in one chain per element, whatever the tile, so that a row's result
// never depends on which rows it was computed beside.

// Rows a tile holds at most: MR * 3 accumulators, 3 operands and a broadcast must fit the register file.
#ifndef DIEN_TILE_ROWS
#error "the instruction set's file defines DIEN_TILE_ROWS"
#endif

constexpr int64_t kPiece = 96;  // steps of a transposed product at a time

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
  for (int64_t first = 0; first < tokens; first += kPiece) {
    const int64_t depth = tokens - first < kPiece ? tokens - first : kPiece;
    for_column_tiles(vectors, [&]<int NV>(int64_t v) {
      for_row_tiles(rows, [&]<int M>(int64_t m) {
        typename L::V acc[M][NV] = {};
        multiply_transposed<L>(a + first * lda + m, lda, b + first * ldb + v * L::N, ldb, depth, acc);
        add_tile<L>(c + m * ldc + v * L::N, ldc, acc);
      });
    });
  }
}

// --- reading and writing tensors of any storage dtype and stride ---

DIEN_INLINE float from_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float f;
  __builtin_memcpy(&f, &wide, 4);
  return f;
}

DIEN_INLINE uint16_t to_bf16(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16) | 0x40;  // NaN stays NaN
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);               // to nearest, ties to even
}

// Rows are short, and a call of the C library's memcpy costs as much as copying one.
template <class T>
DIEN_INLINE void copy_row(const T* in, int64_t n, T* out) {
  constexpr int64_t kWide = 32 / int64_t(sizeof(T));
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) __builtin_memcpy(out + i, in + i, 32);
  if (n - i >= kWide / 2) __builtin_memcpy(out + i, in + i, 16), i += kWide / 2;
#pragma GCC unroll 1
  for (; i < n; ++i) __builtin_memcpy(out + i, in + i, sizeof(T));
}

template <class T>
DIEN_INLINE void read_row(const Array& a, int64_t offset, int64_t stride, int64_t n, T* out) {
  if (a.store == Store::bf16) {
    const uint16_t* p = static_cast<const uint16_t*>(a.data) + offset;
    for (int64_t i = 0; i < n; ++i) out[i] = T(from_bf16(p[i * stride]));
  } else {
    const T* p = static_cast<const T*>(a.data) + offset;
    if (stride == 1)
      copy_row(p, n, out);
    else
      for (int64_t i = 0; i < n; ++i) out[i] = p[i * stride];
  }
}

template <class T>
DIEN_INLINE T read_one(const Array& a, int64_t offset) {
  T value;
  read_row(a, offset, 1, 1, &value);
  return value;
}

// `p` is contiguous storage of dtype `store`.
template <class T>
DIEN_INLINE void write_row(void* p, Store store, int64_t offset, int64_t n, const T* in) {
  if (store == Store::bf16) {
    uint16_t* q = static_cast<uint16_t*>(p) + offset;
    for (int64_t i = 0; i < n; ++i) q[i] = to_bf16(float(in[i]));
  } else {
    copy_row(in, n, static_cast<T*>(p) + offset);
  }
}

DIEN_INLINE int64_t size_of(Store store) { return store == Store::bf16 ? 2 : store == Store::f32 ? 4 : 8; }

// Asks for n values from `first` on, ahead of their use: into the second-level cache, as those of many rows overflow the
// first.
DIEN_INLINE void prefetch(const void* p, int64_t bytes_each, int64_t n, int64_t first = 0) {
  const char* at = static_cast<const char*>(p) + first * bytes_each;
  for (int64_t line = 0; line < n * bytes_each; line += 64) __builtin_prefetch(at + line, 0, 2);
}

DIEN_INLINE void zero_rows(void* p, Store store, int64_t row, int64_t count, int64_t width) {
  const int64_t bytes = width * size_of(store);
  if (count * bytes == 0) return;  // a tensor without elements has no address, and memset asks for one
  __builtin_memset(static_cast<char*>(p) + row * bytes, 0, count * bytes);
}

// --- packing weights ---
// Logical weight rows are gates r, u, n.

// A weight matrix [3 H][columns] in the compute dtype, and the sign that brings its update gate to the candidate side.
template <class T>
struct Matrix {
  const T* data;
  int64_t stride, hidden, columns;
  T update_sign;

  DIEN_INLINE const T* row(int64_t gate, int64_t unit) const { return data + (gate * hidden + unit) * stride; }
  DIEN_INLINE T sign(int64_t gate) const { return gate == 1 ? update_sign : T(1); }
};

// Reads `w` in place where its rows are contiguous and in the compute dtype, else from a copy made in `plain`.
template <class T>
Matrix<T> read_matrix(const Array& w, int64_t hidden, int64_t columns, bool keep_side, T* plain) {
  const T sign = keep_side ? T(-1) : T(1);
  if (w.store != Store::bf16 && w.s1 == 1) return {static_cast<const T*>(w.data), w.s0, hidden, columns, sign};
  for (int64_t row = 0; row < 3 * hidden; ++row) read_row(w, row * w.s0, w.s1, columns, plain + row * columns);
  return {plain, columns, hidden, columns, sign};
}

// N rows of N values each become N columns: log2 N rounds of interleaving the first half of the rows with the second.
template <class L, class T = typename L::Scalar>
DIEN_INLINE void transpose(const T* in, int64_t in_row, T* out, int64_t out_row, T sign) {
  constexpr int N = L::N;
  typedef typename IndexOf<sizeof(T)>::Type I __attribute__((vector_size(N * sizeof(T))));
  I low, high;
  for (int i = 0; i < N; ++i) low[i] = i / 2 + i % 2 * N, high[i] = low[i] + N / 2;
  typename L::V a[N], b[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) a[i] = sign * L::load(in + i * in_row);
#pragma GCC unroll 4
  for (int round = 1; round < N; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i) {
      b[2 * i] = __builtin_shuffle(a[i], a[i + N / 2], low);
      b[2 * i + 1] = __builtin_shuffle(a[i], a[i + N / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) a[i] = b[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) L::store(out + i * out_row, a[i]);
}

// For units in lanes: [unit block][column][gates first..first+count][N], zeros past the last unit.
template <class L, class T = typename L::Scalar>
DIEN_NOINLINE void pack_gates(const Matrix<T>& w, int first, int count, T* out) {
  const int64_t column = count * L::N;  // values of one column of a unit block
  for (int64_t from = 0; from < w.hidden; from += L::N, out += w.columns * column)
    for (int gate = 0; gate < count; ++gate) {
      const int64_t units = w.hidden - from < L::N ? w.hidden - from : L::N;
      const T* in = w.row(first + gate, from);
      const T sign = w.sign(first + gate);
      T* to = out + gate * L::N;
      int64_t k = 0;
      if (units == L::N)
        for (; k + L::N <= w.columns; k += L::N) transpose<L>(in + k, w.stride, to + k * column, column, sign);
      for (; k < w.columns; ++k) {
        for (int64_t lane = 0; lane < units; ++lane) to[k * column + lane] = sign * in[lane * w.stride + k];
        for (int64_t lane = units; lane < L::N; ++lane) to[k * column + lane] = 0;
      }
    }
}

// For columns in lanes, as `product` reads them: tiles of up to three vectors, each [gate in order][unit][vectors][N].
template <class L, class T = typename L::Scalar>
DIEN_NOINLINE void pack_columns(const Matrix<T>& w, const int* gates, int count, T* out) {
  for_column_tiles(round_up(w.columns, L::N) / L::N, [&]<int NV>(int64_t v) {
    const int64_t from = v * L::N, width = NV * L::N;
    const int64_t live = w.columns - from < width ? w.columns - from : width;
    for (int g = 0; g < count; ++g)
      for (int64_t unit = 0; unit < w.hidden; ++unit, out += width) {
        const T* in = w.row(gates[g], unit) + from;
        const T sign = w.sign(gates[g]);
        int64_t lane = 0;
        for (; lane + L::N <= live; lane += L::N) L::store(out + lane, sign * L::load(in + lane));
        for (; lane < live; ++lane) out[lane] = sign * in[lane];
        for (; lane < width; ++lane) out[lane] = 0;
      }
  });
}
