// The multilayer perceptron of attention and auxiliary loss: equations (M1) and (M2) of docs/math-attention.md, for a chunk
// of tokens. Included inside an instruction set's namespace.
//
// The first product is the op's own, which never builds its input: it leaves z_1 [tokens][padded outputs] in the first
// layer's z, and gets its derivative back. Gradients add up in the sums of a group, so that they do not depend on the
// threads.

template <class L>
struct Tail {
  using T = typename L::Scalar;
  using V = typename L::V;
  using A = Activations<T, L::N>;

  const Mlp& mlp;

  int64_t last() const { return mlp.count - 1; }
  static int64_t padded(int64_t n) { return round_up(n, L::N); }
  static bool has_slope(const Mlp& mlp, int64_t layer) {
    return layer < mlp.count - 1 && mlp.activation == Activation::prelu;
  }
  // Values of the largest matrix: twice as many are room for it, while it is packed, and for its transpose.
  static int64_t largest(const Mlp& mlp) {
    int64_t n = 0;
    for (int64_t i = 0; i < mlp.count; ++i)
      n = n > mlp.layers[i].in * mlp.layers[i].out ? n : mlp.layers[i].in * mlp.layers[i].out;
    return n;
  }
  static int64_t widest(const Mlp& mlp) {
    int64_t n = 0;
    for (int64_t i = 0; i < mlp.count; ++i) n = n > padded(mlp.layers[i].out) ? n : padded(mlp.layers[i].out);
    return n;
  }

  // The weights of one layer in the compute dtype. The first layer's matrix is the op's, which packs it as it needs it.
  struct Packed {
    T *bias, *slope;  // [padded outputs]
    T* forward;       // W^T, packed for products; of the last layer its one row [padded inputs]
    T* backward;      // W, packed for products; of the last layer unused
    Packed(const Mlp& mlp, int64_t layer, bool derive, Arena& arena) {
      const Layer& l = mlp.layers[layer];
      const bool last = layer == mlp.count - 1;
      bias = arena.take<T>(padded(l.out));
      slope = arena.take<T>(has_slope(mlp, layer) ? padded(l.out) : 0);
      forward = arena.take<T>(layer == 0 ? 0 : last ? padded(l.in) : l.in * padded(l.out));
      backward = arena.take<T>(!derive || layer == 0 || last ? 0 : l.out * padded(l.in));
    }
  };

  // One group's gradient sums of a layer: W [out][padded inputs], bias and slope [padded outputs].
  struct Sums {
    T *weight, *bias, *slope;
    Sums(const Mlp& mlp, int64_t layer, Arena& arena) {
      const Layer& l = mlp.layers[layer];
      weight = arena.take<T>(layer == 0 ? 0 : l.out * padded(l.in));
      bias = arena.take<T>(padded(l.out));
      slope = arena.take<T>(has_slope(mlp, layer) ? padded(l.out) : 0);
    }
  };

  // A layer's values for a chunk, [tokens][padded outputs]; a stands in the place of z where z is not wanted again.
  struct Values {
    T *z, *a;
    Values(const Mlp& mlp, int64_t layer, int64_t tokens, Arena& arena) {
      const int64_t n = tokens * padded(mlp.layers[layer].out);
      z = arena.take<T>(layer == 0 || layer < mlp.count - 1 ? n : 0);
      a = has_slope(mlp, layer) ? arena.take<T>(n) : z;
    }
  };

  // An array with one Part a layer, which stands in the arena beside what the parts point to.
  template <class Part, class... Options>
  static Part* take_layers(const Mlp& mlp, Arena& arena, Options... options) {
    Part* parts = arena.take<Part>(mlp.count);
    for (int64_t i = 0; i < mlp.count; ++i) {
      const Part part(mlp, i, options..., arena);
      if (parts) parts[i] = part;
    }
    return parts;
  }

  // Packs the layers behind the first, and all biases and slopes. `plain` has room for twice the largest matrix.
  void fill(const Packed* packed, T* plain, bool derive) const {
    for (int64_t i = 0; i < mlp.count; ++i) {
      const Layer& l = mlp.layers[i];
      const Packed& w = packed[i];
      read_vector(l.bias, l.out, padded(l.out), w.bias);
      if (has_slope(mlp, i)) {
        if (l.one_slope)
          for (int64_t j = 0; j < padded(l.out); ++j) w.slope[j] = read_one<T>(l.slope, 0);
        else
          read_vector(l.slope, l.out, padded(l.out), w.slope);
      }
      if (i == 0) continue;
      read_rows(l.weight, l.out, l.in, plain);
      if (i < last()) {
        pack_matrix<L>(plain, l.in, l.out, l.in, plain + l.out * l.in, w.forward, derive ? w.backward : nullptr);
      } else {
        for (int64_t j = 0; j < padded(l.in); ++j) w.forward[j] = j < l.in ? plain[j] : T(0);
      }
    }
  }

  // (M1): x[t] = z_L from z_1.
  void forward(const Packed* packed, const Values* values, int64_t tokens, T* x) const {
    if (last() == 0) {
      const int64_t width = padded(mlp.layers[0].out);
      for (int64_t t = 0; t < tokens; ++t) x[t] = values[0].z[t * width];
    }
    for (int64_t i = 0; i < last(); ++i) {
      const int64_t out = mlp.layers[i].out, width = padded(out);
      const T* a = values[i].a;
      activate(width, packed[i], values[i], tokens);
      const Packed& next = packed[i + 1];
      if (i + 1 < last()) {
        const int64_t next_width = padded(mlp.layers[i + 1].out);
        affine<L>(a, width, next.forward, out, next.bias, 0, next_width / L::N, tokens, values[i + 1].z, next_width);
        continue;
      }
      const T *w = next.forward, bias = next.bias[0];
      for (int64_t t = 0; t < tokens; ++t) {
        const T* row = a + t * width;
        V sum{};
        int64_t j = 0;
        for (; j + L::N <= out; j += L::N) sum += L::load(row + j) * L::load(w + j);
        T rest = bias;  // not the padding: where an input was infinite there is NaN in it
        for (; j < out; ++j) rest += row[j] * w[j];
        x[t] = L::sum(sum) + rest;
      }
    }
  }

  // (M2), after `forward`: from the derivative by z_L to the one by z_1, which is returned. Adds the gradients of the
  // layers behind the first and of the slopes to `sums`. `d` has room for twice `tokens * widest` values, in which the
  // result stands.
  T* backward(const Packed* packed, const Values* values, int64_t tokens, const T* dx, T* d, const Sums* sums) const {
    if (last() == 0) {
      const int64_t width = padded(mlp.layers[0].out);
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t j = 0; j < width; ++j) d[t * width + j] = 0;
        d[t * width] = dx[t];
      }
      return d;
    }
    last_layer_backward(packed[last()], values[last() - 1].a, tokens, dx, d, sums[last()]);
    T* other = d + tokens * widest(mlp);
    for (int64_t i = last() - 1; i >= 0; --i) {
      const Layer& l = mlp.layers[i];
      const int64_t width = padded(l.out), inputs = padded(l.in);
      derive(width, packed[i], values[i], tokens, d, sums[i].slope);
      if (i == 0) break;
      product_transposed<L>(d, width, values[i - 1].a, inputs, tokens, l.out, inputs / L::N, sums[i].weight, inputs);
      add_column_sums<L>(d, width, tokens, width, sums[i].bias);
      product<L, false>(d, width, 1, 0, packed[i].backward, l.out, inputs / L::N, tokens, other, inputs);
      T* swapped = d;
      d = other;
      other = swapped;
    }
    return d;
  }

  // The sums of all groups to the results, but for the first layer's matrix. `first`: the sums of the first group; `row`
  // has room for a padded row.
  void reduce(const Workspace& workspace, const Sums* first, T* row) const {
    constexpr Store compute = sizeof(T) == 8 ? Store::f64 : Store::f32;
    for (int64_t i = 0; i < mlp.count; ++i) {
      const Layer& l = mlp.layers[i];
      for (int64_t o = 0; i > 0 && o < l.out; ++o) {
        sum_groups(workspace, first[i].weight + o * padded(l.in), l.in, row);
        write_row(l.dweight, mlp.gradients, o * l.in, l.in, row);
      }
      if (l.dbias) {
        sum_groups(workspace, first[i].bias, l.out, row);
        write_row(l.dbias, compute, 0, l.out, row);
      }
      if (l.dslope) {
        sum_groups(workspace, first[i].slope, l.out, row);
        for (int64_t j = 1; l.one_slope && j < l.out; ++j) row[0] += row[j];
        write_row(l.dslope, compute, 0, l.one_slope ? 1 : l.out, row);
      }
    }
  }

 private:
  void last_layer_backward(const Packed& w, const T* a, int64_t tokens, const T* dx, T* d, const Sums& sums) const {
    const int64_t inputs = padded(mlp.layers[last()].in);
    for (int64_t j = 0; j < inputs; j += L::N) {
      const V weight = L::load(w.forward + j);
      V sum{};
      for (int64_t t = 0; t < tokens; ++t) {
        sum += dx[t] * L::load(a + t * inputs + j);
        L::store(d + t * inputs + j, dx[t] * weight);
      }
      L::store(sums.weight + j, L::load(sums.weight + j) + sum);
    }
    T sum = 0;
    for (int64_t t = 0; t < tokens; ++t) sum += dx[t];
    sums.bias[0] += sum;
  }

  // a = act(z), written so that NaN passes, as in torch.
  void activate(int64_t width, const Packed& w, const Values& values, int64_t tokens) const {
    const T *z = values.z, *slope = w.slope;
    T* a = values.a;
    const V zero{};
    const auto each = [&](auto&& f) {
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t j = 0; j < width; j += L::N) L::store(a + t * width + j, f(L::load(z + t * width + j), j));
    };
    switch (mlp.activation) {
      case Activation::sigmoid:
        return each([](V v, int64_t) { return A::sigmoid(v); });
      case Activation::relu:
        return each([&](V v, int64_t) { return v < zero ? zero : v; });
      case Activation::prelu:
        return each([&](V v, int64_t j) { return v > zero ? v : L::load(slope + j) * v; });
      case Activation::none:
        return;
    }
  }

  // d = act'(z) d, and the slopes' gradients.
  void derive(int64_t width, const Packed& w, const Values& values, int64_t tokens, T* d, T* dslope) const {
    const V zero{};
    const T *z = values.z, *a = values.a, *slope = w.slope;
    const auto each = [&](auto&& f) {
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t j = 0; j < width; j += L::N) {
          const int64_t at = t * width + j;
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
        for (int64_t j = 0; j < width; j += L::N) {
          V sum{};
          for (int64_t t = 0; t < tokens; ++t) {
            const V y = L::load(z + t * width + j);
            sum += y > zero ? zero : y * L::load(d + t * width + j);
          }
          L::store(dslope + j, L::load(dslope + j) + sum);
        }
        return each([&](V v, int64_t at, int64_t j) { return L::load(z + at) > zero ? v : L::load(slope + j) * v; });
      case Activation::none:
        return;
    }
  }
};
