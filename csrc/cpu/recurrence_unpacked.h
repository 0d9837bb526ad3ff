// The forward of a few steps: packing the weights would cost more than using them, so each pre-activation is the product
// of one weight row, read where it lies, with the state. Included inside an instruction set's namespace.
//
// Equations (1) to (9) of docs/math.md. Needs weights in the compute dtype with contiguous rows; keeps no gates.

template <class L>
struct Unpacked {
  using T = typename L::Scalar;
  using V = typename L::V;
  using A = Activations<T, L::N>;

  const RecurrenceCall& call;
  const Shape<L> s;
  const Weights<L>& w;

  // Padded with zeros to whole vectors; gates one after another, [3][Hp].
  struct Scratch {
    T *x, *h, *q, *gx, *gh;
    Scratch(const Shape<L>& s, Arena& arena)
        : x(arena.take<T>(s.Ip)),
          h(arena.take<T>(s.Hp)),
          q(arena.take<T>(s.Hp)),
          gx(arena.take<T>(3 * s.Hp)),
          gh(arena.take<T>(3 * s.Hp)) {}
  };

  void run(char* memory) const {
    Arena arena{memory};
    const Scratch c(s, arena);
    for (int64_t j = 0; j < 3 * s.Hp; ++j) c.gx[j] = c.gh[j] = 0;
    for (int64_t i = 0; i < call.batch; ++i) {
      const Row& row = call.rows[i];
      for (int64_t j = 0; j < s.Hp; ++j) c.h[j] = 0;
      if (call.h0.data) read_row(call.h0, row.b * call.h0.s0, call.h0.s1, s.H, c.h);
      for (int64_t t = 0; t < row.length; ++t) {
        gather_padded<L>(call.x, row.x + t * call.x_step, call.x.s2, s.I, s.Ip, c.x);
        step(Scalars<T>(call, row, t), c);
        write_row(call.y, call.x.store, (row.y + t * call.y_step) * s.H, s.H, c.h);
      }
      write_row(call.h_n, call.x.store, row.b * s.H, s.H, c.h);
      zero_padding(call, call.y, row.b, row.length, call.batch, s.H);
    }
  }

 private:
  void step(const Scalars<T>& k, const Scratch& c) const {
    const bool before = call.reset_before;
    const V sign = L::splat(call.keep_side ? T(-1) : T(1));
    products(call.w_ih, 0, 3, c.x, s.I, c.gx);
    products(call.w_hh, 0, before ? 2 : 3, c.h, s.H, c.gh);
    T *u_gate = c.gx + s.Hp, *n_gate = c.gx + 2 * s.Hp;
    for (int64_t j = 0; j < s.Hp; j += L::N) {
      V r = k.gamma * L::load(c.gx + j) + L::load(w.bias_x + j) + L::load(c.gh + j);
      V u = sign * (k.gamma * L::load(u_gate + j) + L::load(c.gh + s.Hp + j)) + L::load(w.bias_x + s.Hp + j);
      const V n = k.gamma * L::load(n_gate + j) + L::load(w.bias_x + 2 * s.Hp + j);
      A::sigmoid2(r, u);
      L::store(u_gate + j, u);
      L::store(n_gate + j, before ? n : n + r * (L::load(c.gh + 2 * s.Hp + j) + L::load(w.bias_n + j)));
      L::store(c.q + j, r * L::load(c.h + j));
    }
    if (before) products(call.w_hh, 2, 1, c.q, s.H, c.gh + 2 * s.Hp);
    for (int64_t j = 0; j < s.Hp; j += L::N) {
      V n = L::load(n_gate + j);
      if (before) n += L::load(c.gh + 2 * s.Hp + j);
      L::store(c.h + j, next_state(L::load(c.h + j), L::load(u_gate + j), A::tanh(n), k.alpha, k.beta));
    }
    for (int64_t j = s.H; j < s.Hp; ++j) c.h[j] = 0;  // the units past the last one are no state
  }

  // out[gate][unit] = W[gate][unit] v, eight rows at a time: as many sums as hide an addition's latency.
  void products(const Array& weights, int64_t gate, int64_t gates, const T* v, int64_t depth, T* out) const {
    const T* rows = static_cast<const T*>(weights.data) + gate * s.H * weights.s0;
    for (int64_t g = 0; g < gates; ++g, out += s.Hp, rows += s.H * weights.s0)
      for_row_tiles<4>(s.H, 0, [&]<int M>(int64_t unit) {
        const T* in = rows + unit * weights.s0;
        V acc[M] = {};
        int64_t k = 0;
        for (; k + L::N <= depth; k += L::N)
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) acc[m] += L::load(v + k) * L::load(in + m * weights.s0 + k);
        for (int m = 0; m < M; ++m) {
          T sum = L::sum(acc[m]);
          for (int64_t rest = k; rest < depth; ++rest) sum += v[rest] * in[m * weights.s0 + rest];
          out[unit + m] = sum;
        }
      });
  }
};
