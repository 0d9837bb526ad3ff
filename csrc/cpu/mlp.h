// The multilayer perceptron of attention and auxiliary loss: equations (M1) and (M2) of docs/math-attention.md, for a chunk
// of tokens. Included inside an instruction set's namespace.
//
// The first product is the op's, which never builds its input: it leaves z_1 [tokens][out_padded] at layers[0].z_at, and
// gets its derivative back. Sums of gradients go to a group's place, so that they do not depend on the threads.

DIEN_INLINE float exponential(float x) { return __builtin_expf(x); }
DIEN_INLINE double exponential(double x) { return __builtin_exp(x); }
DIEN_INLINE float logarithm(float x) { return __builtin_logf(x); }
DIEN_INLINE double logarithm(double x) { return __builtin_log(x); }
DIEN_INLINE float logarithm_plus_one(float x) { return __builtin_log1pf(x); }
DIEN_INLINE double logarithm_plus_one(double x) { return __builtin_log1p(x); }

// The place, in values, of the next n values of a memory of which `bytes` are taken.
template <class T>
int64_t take(int64_t& bytes, int64_t n) {
  const int64_t at = bytes / int64_t(sizeof(T));
  bytes += round_up(n * int64_t(sizeof(T)), 64);
  return at;
}

template <class T>
DIEN_NOINLINE void read_rows(const Array& w, int64_t rows, int64_t columns, T* out) {
  for (int64_t i = 0; i < rows; ++i) read_row(w, i * w.s0, w.s1, columns, out + i * columns);
}

template <class T>
DIEN_NOINLINE void read_vector(const Array& v, int64_t n, int64_t padded, T* out) {
  for (int64_t i = 0; i < padded; ++i) out[i] = i < n && v.data ? read_one<T>(v, i * v.s0) : T(0);
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

// out[..] += the sum of the rows of a.
template <class L, class T = typename L::Scalar>
DIEN_NOINLINE void add_column_sums(const T* a, int64_t lda, int64_t rows, int64_t padded, T* out) {
  for (int64_t j = 0; j < padded; j += L::N) {
    typename L::V sum{};
    for (int64_t i = 0; i < rows; ++i) sum += L::load(a + i * lda + j);
    L::store(out + j, L::load(out + j) + sum);
  }
}

// out[..n) = the sum over groups of what stands at `at` in their sums, in order.
template <class T>
DIEN_NOINLINE void sum_groups(const Room& room, int64_t at, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = 0;
  for (int64_t g = 0; g < room.groups; ++g) {
    const T* in = reinterpret_cast<const T*>(room.partial + g * room.partial_bytes) + at;
    for (int64_t i = 0; i < n; ++i) out[i] += in[i];
  }
}

template <class L>
struct Tail {
  using T = typename L::Scalar;
  using V = typename L::V;
  using A = Activations<T, L::N>;

  const Mlp& mlp;

  int64_t last() const { return mlp.count - 1; }
  // Values of the largest matrix: twice as many are room for it, while it is packed, and for its transpose.
  static int64_t largest(const Mlp& mlp) {
    int64_t n = 0;
    for (int64_t i = 0; i < mlp.count; ++i)
      n = n > mlp.layers[i].in * mlp.layers[i].out ? n : mlp.layers[i].in * mlp.layers[i].out;
    return n;
  }
  static int64_t widest(const Mlp& mlp) {
    int64_t n = 0;
    for (int64_t i = 0; i < mlp.count; ++i) n = n > mlp.layers[i].out_padded ? n : mlp.layers[i].out_padded;
    return n;
  }

  static void lay_out(Mlp& mlp, int64_t tokens, bool backward, Room& room) {
    for (int64_t i = 0; i < mlp.count; ++i) {
      Layer& l = mlp.layers[i];
      const bool hidden = i < mlp.count - 1, prelu = hidden && mlp.activation == Activation::prelu;
      l.in_padded = round_up(l.in, L::N);
      l.out_padded = round_up(l.out, L::N);
      l.bias_at = take<T>(room.packed_bytes, l.out_padded);
      l.slope_at = take<T>(room.packed_bytes, prelu ? l.out_padded : 0);
      l.forward_at = take<T>(room.packed_bytes, i == 0 ? 0 : hidden ? l.in * l.out_padded : l.in_padded);
      l.backward_at = take<T>(room.packed_bytes, backward && i > 0 && hidden ? l.out * l.in_padded : 0);
      l.z_at = take<T>(room.scratch_bytes, hidden || i == 0 ? tokens * l.out_padded : 0);
      l.a_at = prelu ? take<T>(room.scratch_bytes, tokens * l.out_padded) : l.z_at;
      if (!backward) continue;
      l.dweight_at = take<T>(room.partial_bytes, i > 0 ? l.out * l.in_padded : 0);
      l.dbias_at = take<T>(room.partial_bytes, l.out_padded);
      l.dslope_at = take<T>(room.partial_bytes, prelu ? l.out_padded : 0);
    }
  }

  // The layers behind the first, and all biases and slopes. `plain` has room for twice the largest matrix.
  void fill(T* packed, T* plain, bool backward) const {
    for (int64_t i = 0; i < mlp.count; ++i) {
      const Layer& l = mlp.layers[i];
      read_vector(l.bias, l.out, l.out_padded, packed + l.bias_at);
      if (i < last() && mlp.activation == Activation::prelu) {
        if (l.one_slope)
          for (int64_t j = 0; j < l.out_padded; ++j) packed[l.slope_at + j] = read_one<T>(l.slope, 0);
        else
          read_vector(l.slope, l.out, l.out_padded, packed + l.slope_at);
      }
      if (i == 0) continue;
      read_rows(l.weight, l.out, l.in, plain);
      if (i < last()) {
        pack_matrix<L>(plain, l.in, l.out, l.in, plain + l.out * l.in, packed + l.forward_at,
                       backward ? packed + l.backward_at : nullptr);
      } else {
        for (int64_t j = 0; j < l.in_padded; ++j) packed[l.forward_at + j] = j < l.in ? plain[j] : T(0);
      }
    }
  }

  // x[t] = z_L from z_1.
  void forward(const T* packed, T* scratch, int64_t tokens, T* x) const {
    if (last() == 0)
      for (int64_t t = 0; t < tokens; ++t) x[t] = scratch[mlp.layers[0].z_at + t * mlp.layers[0].out_padded];
    for (int64_t i = 0; i < last(); ++i) {
      const Layer &l = mlp.layers[i], &next = mlp.layers[i + 1];
      T *z = scratch + l.z_at, *a = scratch + l.a_at;
      activate(l, packed, z, a, tokens);
      if (i + 1 < last()) {
        affine<L>(a, l.out_padded, packed + next.forward_at, next.in, packed + next.bias_at, 0, next.out_padded / L::N,
                  tokens, scratch + next.z_at, next.out_padded);
        continue;
      }
      const T *w = packed + next.forward_at, bias = packed[next.bias_at];
      for (int64_t t = 0; t < tokens; ++t) {
        const T* row = a + t * l.out_padded;
        V sum{};
        int64_t j = 0;
        for (; j + L::N <= l.out; j += L::N) sum += L::load(row + j) * L::load(w + j);
        T rest = bias;  // not the padding: where an input was infinite there is NaN in it
        for (; j < l.out; ++j) rest += row[j] * w[j];
        x[t] = L::sum(sum) + rest;
      }
    }
  }

  // From the derivative by z_L, after `forward`: adds the gradients of the layers behind the first and of the slopes to
  // `sums`, and returns the derivative by z_1, which stands in d or behind its first `tokens * widest` values.
  T* backward(const T* packed, T* scratch, int64_t tokens, const T* dx, T* d, T* sums) const {
    const Layer& top = mlp.layers[last()];
    if (last() == 0) {
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t j = 0; j < top.out_padded; ++j) d[t * top.out_padded + j] = 0;
        d[t * top.out_padded] = dx[t];
      }
      return d;
    }
    T* other = d + tokens * widest(mlp);
    const T* a = scratch + mlp.layers[last() - 1].a_at;
    for (int64_t j = 0; j < top.in_padded; j += L::N) {
      const V w = L::load(packed + top.forward_at + j);
      V sum{};
      for (int64_t t = 0; t < tokens; ++t) {
        sum += dx[t] * L::load(a + t * top.in_padded + j);
        L::store(d + t * top.in_padded + j, dx[t] * w);
      }
      L::store(sums + top.dweight_at + j, L::load(sums + top.dweight_at + j) + sum);
    }
    T sum = 0;
    for (int64_t t = 0; t < tokens; ++t) sum += dx[t];
    sums[top.dbias_at] += sum;
    for (int64_t i = last() - 1; i >= 0; --i) {
      const Layer& l = mlp.layers[i];
      derive(l, packed, scratch, tokens, d, sums);
      if (i == 0) break;
      const T* in = scratch + mlp.layers[i - 1].a_at;
      product_transposed<L>(d, l.out_padded, in, l.in_padded, tokens, l.out, l.in_padded / L::N, sums + l.dweight_at,
                            l.in_padded);
      add_column_sums<L>(d, l.out_padded, tokens, l.out_padded, sums + l.dbias_at);
      product<L, false>(d, l.out_padded, 1, 0, packed + l.backward_at, l.out, l.in_padded / L::N, tokens, other,
                        l.in_padded);
      T* swapped = d;
      d = other;
      other = swapped;
    }
    return d;
  }

  // The sums of all groups to the results, but for the first layer's matrix. `row` has room for a padded row.
  void reduce(const Room& room, T* row) const {
    constexpr Store compute = sizeof(T) == 8 ? Store::f64 : Store::f32;
    for (int64_t i = 0; i < mlp.count; ++i) {
      const Layer& l = mlp.layers[i];
      for (int64_t o = 0; i > 0 && o < l.out; ++o) {
        sum_groups(room, l.dweight_at + o * l.in_padded, l.in, row);
        write_row(l.dweight, mlp.gradients, o * l.in, l.in, row);
      }
      if (l.dbias) {
        sum_groups(room, l.dbias_at, l.out, row);
        write_row(l.dbias, compute, 0, l.out, row);
      }
      if (l.dslope) {
        sum_groups(room, l.dslope_at, l.out, row);
        for (int64_t j = 1; l.one_slope && j < l.out; ++j) row[0] += row[j];
        write_row(l.dslope, compute, 0, l.one_slope ? 1 : l.out, row);
      }
    }
  }

 private:
  // Written so that NaN passes, as in torch.
  void activate(const Layer& l, const T* packed, const T* z, T* a, int64_t tokens) const {
    const V zero{};
    const auto each = [&](auto&& f) {
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t j = 0; j < l.out_padded; j += L::N)
          L::store(a + t * l.out_padded + j, f(L::load(z + t * l.out_padded + j), j));
    };
    switch (mlp.activation) {
      case Activation::sigmoid:
        return each([](V v, int64_t) { return A::sigmoid(v); });
      case Activation::relu:
        return each([&](V v, int64_t) { return v < zero ? zero : v; });
      case Activation::prelu:
        return each([&](V v, int64_t j) { return v > zero ? v : L::load(packed + l.slope_at + j) * v; });
      case Activation::none:
        return;
    }
  }

  // d = act'(z) d, and the slopes' gradients.
  void derive(const Layer& l, const T* packed, const T* scratch, int64_t tokens, T* d, T* sums) const {
    const V zero{};
    const T *z = scratch + l.z_at, *a = scratch + l.a_at;
    const auto each = [&](auto&& f) {
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t j = 0; j < l.out_padded; j += L::N) {
          const int64_t at = t * l.out_padded + j;
          L::store(d + at, f(L::load(d + at), at, j));
        }
    };
    switch (mlp.activation) {
      case Activation::sigmoid:
        return each([&](V v, int64_t at, int64_t) {
          const V y = L::load(a + at);
          return v * (y * (T(1) - y));
        });
      case Activation::relu:
        return each([&](V v, int64_t at, int64_t) { return L::load(a + at) <= zero ? zero : v; });
      case Activation::prelu:
        for (int64_t j = 0; j < l.out_padded; j += L::N) {
          V sum{};
          for (int64_t t = 0; t < tokens; ++t) {
            const V y = L::load(z + t * l.out_padded + j);
            sum += y > zero ? zero : y * L::load(d + t * l.out_padded + j);
          }
          L::store(sums + l.dslope_at + j, L::load(sums + l.dslope_at + j) + sum);
        }
        return each([&](V v, int64_t at, int64_t j) {
          return L::load(z + at) > zero ? v : L::load(packed + l.slope_at + j) * v;
        });
      case Activation::none:
        return;
    }
  }
};
