// Weights in the orders in which the products of gemm.h read them. Included inside an instruction set's namespace.
//
// The rows of a weight matrix are those of the gates r, u, n, one gate after another.

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

// w [out][in], rows `stride` apart, for products with W^T (`forward`, [in] x out) and, unless null, W (`backward`).
template <class L, class T = typename L::Scalar>
DIEN_NOINLINE void pack_matrix(const T* w, int64_t stride, int64_t out, int64_t in, T* transposed, T* forward,
                               typename L::Scalar* backward) {
  static constexpr int whole[1] = {0};
  for (int64_t o = 0; o < out; ++o)
    for (int64_t i = 0; i < in; ++i) transposed[i * out + o] = w[o * stride + i];
  pack_columns<L>(Matrix<T>{transposed, out, in, out, T(1)}, whole, 1, forward);
  if (backward) pack_columns<L>(Matrix<T>{w, stride, out, in, T(1)}, whole, 1, backward);
}
