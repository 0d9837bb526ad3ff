// Forward of the masked recurrence, equations (1) to (9) of docs/math.md. Included inside an instruction set's namespace.
//
// A thread owns a block of rows for the whole sequence. A chunk of time at a time: x is gathered, projected (gx), the steps
// run in order with the activations applied to the accumulators of the recurrent product, then the states are scattered
// to y. Weights stay in the first two cache levels; gx, x and h of a chunk in the second.

template <class L>
struct Forward {
  using T = typename L::Scalar;
  using V = typename L::V;
  using A = Activations<T, L::N>;

  const RecurrenceCall& call;
  const Shape<L> s;
  const Weights<L>& w;

  struct Scratch {
    T *xs, *gx, *hs, *state, *q, *u;
    T** kept;  // each token's place in the kept gates
    Scalars<T>* scalars;
    Scratch(const RecurrenceCall& call, const Shape<L>& s, Arena& arena) {
      const int64_t tokens = call.chunk_tokens, rows = call.block_rows;
      xs = arena.take<T>(tokens * s.Ip);
      gx = arena.take<T>(tokens * 3 * s.Hp);
      hs = arena.take<T>(tokens * s.Hp);
      state = arena.take<T>(rows * s.Hp);
      q = arena.take<T>(call.reset_before ? rows * s.Hp : 0);
      u = arena.take<T>(call.reset_before ? rows * s.Hp : 0);
      kept = arena.take<T*>(call.gates ? tokens : 0);
      scalars = arena.take<Scalars<T>>(tokens);
    }
  };

  void run_block(char* memory, int64_t index) const {
    Arena arena{memory};
    const Scratch c(call, s, arena);
    const Block block(call, index);
    for (int64_t i = 0; i < block.count; ++i) {
      T* state = c.state + i * s.Hp;
      if (call.h0.data)
        gather_padded<L>(call.h0, block.rows[i].b * call.h0.s0, call.h0.s1, s.H, s.Hp, state);
      else
        for (int64_t j = 0; j < s.Hp; ++j) state[j] = 0;
      if (block.rows[i].length == 0) write_row(call.h_n, call.x.store, block.rows[i].b * s.H, s.H, state);
    }
    for (int64_t at = 0; at < block.longest();) {
      const Chunk chunk = block.chunk_from(at);
      project(block, chunk, c);
      const T* h = c.state;
      block.for_steps(chunk, [&](int64_t, int64_t alive, int64_t base) {
        if (call.reset_before)
          step_before(alive, base, h, c);
        else
          step_after(alive, base, h, c);
        h = c.hs + base * s.Hp;
      });
      scatter(block, chunk, c);
      at = chunk.last;
    }
    for (int64_t i = 0; i < block.count; ++i)
      zero_padding(call, call.y, block.rows[i].b, block.rows[i].length, call.batch, s.H);
  }

 private:
  // (1): gx = gamma W_ih x + b of every token, [3][Hp]; W_ih x is read where histories share it.
  void project(const Block& block, const Chunk& chunk, const Scratch& c) const {
    block.for_tokens(chunk, [&](const Row& row, int64_t, int64_t step, int64_t token) {
      c.scalars[token] = Scalars<T>(call, row, step);
      if (call.gates) c.kept[token] = kept_gates<T>(call, s.Hk, row, step);
      if (!call.shared) gather_padded<L>(call.x, row.x + step * call.x_step, call.x.s2, s.I, s.Ip, c.xs + token * s.Ip);
    });
    if (call.shared) {
      const T* projection = reinterpret_cast<const T*>(call.workspace.projection);
      block.for_tokens(chunk, [&](const Row& row, int64_t, int64_t step, int64_t token) {
        const T* in = projection + (row.dx + step * call.dx_step) * 3 * s.Hp;
        const T gamma = c.scalars[token].gamma;
        for (int64_t j = 0; j < 3 * s.Hp; j += L::N)
          L::store(c.gx + token * 3 * s.Hp + j, gamma * L::load(in + j) + L::load(w.bias_x + j));
      });
      return;
    }
    for (int64_t j = 0; j < s.units(); ++j) {
      V bias[3];
      for (int v = 0; v < 3; ++v) bias[v] = L::load(w.bias_x + v * s.Hp + j * L::N);
      for_row_tiles(chunk.tokens, [&]<int M>(int64_t i) {
        V acc[M][3];
        for (int m = 0; m < M; ++m)
          for (int v = 0; v < 3; ++v) acc[m][v] = call.scale_input ? V{} : bias[v];
        multiply<L>(c.xs + i * s.Ip, s.Ip, w.ih + j * s.I * 3 * L::N, s.I, acc);
        if (call.scale_input)
          for (int m = 0; m < M; ++m)
            for (int v = 0; v < 3; ++v) acc[m][v] = c.scalars[i + m].gamma * acc[m][v] + bias[v];
        store_gates<L>(c.gx + i * 3 * s.Hp + j * L::N, 3 * s.Hp, s.Hp, acc);
      });
    }
  }

  // (2) to (5), (7), (8) for the rows alive at one step, whose first token is `base`.
  void step_after(int64_t alive, int64_t base, const T* h, const Scratch& c) const {
    const T* gx = c.gx + base * 3 * s.Hp;
    T* next = c.hs + base * s.Hp;
    for (int64_t j = 0; j < s.units(); ++j) {
      const V bias = L::load(w.bias_n + j * L::N);
      for_row_tiles(alive, [&]<int M>(int64_t i) {
        V acc[M][3];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const T* in = gx + (i + m) * 3 * s.Hp + j * L::N;
          acc[m][0] = L::load(in);
          acc[m][1] = L::load(in + s.Hp);
          acc[m][2] = bias;
        }
        multiply<L>(h + i * s.Hp, s.Hp, w.hh + j * s.H * 3 * L::N, s.H, acc);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const int64_t at = (i + m) * s.Hp + j * L::N;
          V r = acc[m][0], u = acc[m][1];
          A::sigmoid2(r, u);
          const V n = A::tanh(L::load(gx + (i + m) * 3 * s.Hp + 2 * s.Hp + j * L::N) + r * acc[m][2]);
          const Scalars<T>& k = c.scalars[base + i + m];
          L::store(next + at, next_state(L::load(h + at), u, n, k.alpha, k.beta));
          if (call.gates) {
            keep(c, base + i + m, j, 0, r);
            keep(c, base + i + m, j, 1, u);
            keep(c, base + i + m, j, 2, n);
            keep(c, base + i + m, j, 3, acc[m][2]);
          }
        }
      });
    }
  }

  // (2) to (4), (6) to (8): the product of n needs r * h of all units first.
  void step_before(int64_t alive, int64_t base, const T* h, const Scratch& c) const {
    const T* gx = c.gx + base * 3 * s.Hp;
    T* next = c.hs + base * s.Hp;
    for (int64_t j = 0; j < s.units(); ++j)
      for_row_tiles(alive, [&]<int M>(int64_t i) {
        V acc[M][2];
        for (int m = 0; m < M; ++m)
          for (int v = 0; v < 2; ++v) acc[m][v] = L::load(gx + (i + m) * 3 * s.Hp + v * s.Hp + j * L::N);
        multiply<L>(h + i * s.Hp, s.Hp, w.hh + j * s.H * 2 * L::N, s.H, acc);
        for (int m = 0; m < M; ++m) {
          const int64_t at = (i + m) * s.Hp + j * L::N;
          V r = acc[m][0], u = acc[m][1];
          A::sigmoid2(r, u);
          L::store(c.q + at, r * L::load(h + at));
          L::store(c.u + at, u);
          if (call.gates) {
            keep(c, base + i + m, j, 0, r);
            keep(c, base + i + m, j, 1, u);
            keep(c, base + i + m, j, 3, V{});
          }
        }
      });
    for (int64_t j = 0; j < s.units(); ++j)
      for_row_tiles(alive, [&]<int M>(int64_t i) {
        V acc[M][1];
        for (int m = 0; m < M; ++m) acc[m][0] = L::load(gx + (i + m) * 3 * s.Hp + 2 * s.Hp + j * L::N);
        multiply<L>(c.q + i * s.Hp, s.Hp, w.hh_n + j * s.H * L::N, s.H, acc);
        for (int m = 0; m < M; ++m) {
          const int64_t at = (i + m) * s.Hp + j * L::N;
          const V n = A::tanh(acc[m][0]);
          const Scalars<T>& k = c.scalars[base + i + m];
          L::store(next + at, next_state(L::load(h + at), L::load(c.u + at), n, k.alpha, k.beta));
          if (call.gates) keep(c, base + i + m, j, 2, n);
        }
      });
  }

  DIEN_INLINE void keep(const Scratch& c, int64_t token, int64_t j, int gate, V value) const {
    store_kept<L>(c.kept[token] + gate * s.Hk + j * L::N, s.Hk - j * L::N, value);
  }

  void scatter(const Block& block, const Chunk& chunk, const Scratch& c) const {
    block.for_tokens(chunk, [&](const Row& row, int64_t i, int64_t step, int64_t token) {
      const T* h = c.hs + token * s.Hp;
      write_row(call.y, call.x.store, (row.y + step * call.y_step) * s.H, s.H, h);
      if (step == row.length - 1) write_row(call.h_n, call.x.store, row.b * s.H, s.H, h);
      if (step == chunk.last - 1) __builtin_memcpy(c.state + i * s.Hp, h, s.Hp * sizeof(T));
    });
  }
};
