// Backward of the masked recurrence, equations (10) to (22) of docs/math.md. Included inside an instruction set's namespace.
//
// A thread owns a group of blocks. Chunks of time run from the last to the first. Of each: the gates of all tokens are
// recomputed from the stored states in one product (or read, where they were kept); the steps run backwards, replacing gates
// by gradients in place; then dx and the weight gradients are products over the chunk's tokens. Weight gradients add up per
// group, in a fixed order, and groups are summed in order at the end: the bits do not depend on the number of threads.
//
// A token's gradients stand as [an | ar | au | hn], so that dgx = [an ar au] and dgh = [ar au hn] are both contiguous
// (with the reset before the product, hn's place is unused and W_hn receives an).

template <class L>
struct Backward {
  using T = typename L::Scalar;
  using V = typename L::V;
  using A = Activations<T, L::N>;
  enum Segment { kAn, kAr, kAu, kHn };

  const RecurrenceCall& call;
  const Shape<L> s;
  const Weights<L>& w;

  // One row of whatever size, in front of a thread's scratch memory.
  static T* take_line(const Shape<L>& s, Arena& arena) { return arena.take<T>(s.Ip > s.Hp ? s.Ip : s.Hp); }

  struct Scratch {
    T *line, *xs, *hs, *gates, *dxs, *q, *dh, *dq;
    Scalars<T>* scalars;
    T* da;
    int64_t* starts;
    Scratch(const RecurrenceCall& call, const Shape<L>& s, Arena& arena) {
      const int64_t tokens = call.chunk_tokens, rows = call.block_rows;
      line = take_line(s, arena);
      xs = arena.take<T>(tokens * s.Ip);
      hs = arena.take<T>(tokens * s.Hp);
      gates = arena.take<T>(tokens * s.G);
      dxs = arena.take<T>(tokens * s.Ip);
      q = arena.take<T>(call.reset_before ? tokens * s.Hp : 0);
      dh = arena.take<T>(rows * s.Hp);
      dq = arena.take<T>(call.reset_before ? rows * s.Hp : 0);
      scalars = arena.take<Scalars<T>>(tokens);
      da = arena.take<T>(tokens);
      starts = arena.take<int64_t>(call.longest);
    }
  };

  // One group's sums: dW_ih [3][H][Ip] and dW_hh [3][H][Hp] with gates n, r, u and r, u, n; biases [4][Hp].
  struct Sums {
    T *ih, *hh, *bias;
    Sums(const Shape<L>& s, Arena& arena)
        : ih(arena.take<T>(3 * s.H * s.Ip)), hh(arena.take<T>(3 * s.H * s.Hp)), bias(arena.take<T>(4 * s.Hp)) {}
  };

  void run_group(char* memory, int64_t group) const {
    Arena scratch{memory}, group_sums{sums_of(call.workspace, group)};
    const Scratch c(call, s, scratch);
    __builtin_memset(sums_of(call.workspace, group), 0, call.workspace.sizes.sums);
    const Sums sums(s, group_sums);
    for (int64_t index = group; index < block_count(call); index += call.workspace.groups)
      run_block(Block(call, index), c, sums);
  }

  // The histories' share where they are shared: the rows' dgx are summed per step in row order, then (19) and (20).
  void run_history_group(char* memory, int64_t group) const {
    Arena scratch{memory}, group_sums{sums_of(call.workspace, group)};
    const Scratch c(call, s, scratch);
    const Sums sums(s, group_sums);
    for (int64_t u = group; u < call.histories; u += call.workspace.groups) {
      const Row& history = call.history_rows[u];
      if (!is_read(call, u)) {
        for (int64_t t = 0; call.dx && t < history.length; ++t)
          zero_rows(call.dx, call.x.store, history.dx + t * call.dx_step, 1, s.I);
        if (call.dx) zero_padding(call, call.dx, history.u, history.length, call.histories, s.I);
        continue;
      }
      for (int64_t from = 0; from < history.length; from += call.chunk_tokens) {
        const int64_t n = history.length - from < call.chunk_tokens ? history.length - from : call.chunk_tokens;
        for (int64_t t = 0; t < n; ++t) {
          gather_padded<L>(call.x, history.x + (from + t) * call.x_step, call.x.s2, s.I, s.Ip, c.xs + t * s.Ip);
          sum_rows_of_history(u, from + t, c.gates + t * s.G);
        }
        input_products(n, c, sums);
        if (call.dx)
          for (int64_t t = 0; t < n; ++t)
            write_row(call.dx, call.x.store, (history.dx + (from + t) * call.dx_step) * s.I, s.I, c.dxs + t * s.Ip);
      }
      if (call.dx) zero_padding(call, call.dx, history.u, history.length, call.histories, s.I);
    }
  }

  // Weight gradients: groups in order; the stored side of the update gate gets its sign back. Task: a row of one gate.
  void reduce_row(int64_t task, char* memory) const {
    Arena scratch{memory}, first_sums{sums_of(call.workspace, 0)};
    T* line = take_line(s, scratch);
    const Sums first(s, first_sums);
    const int64_t gate = task / s.H, unit = task % s.H;
    const T sign = gate == 1 && call.keep_side ? T(-1) : T(1);
    const int64_t ih_gate = gate == 2 ? 0 : gate + 1;
    reduce(first.ih + (ih_gate * s.H + unit) * s.Ip, s.I, sign, line);
    write_row(call.dw_ih, call.w_ih.store, task * s.I, s.I, line);
    reduce(first.hh + task * s.Hp, s.H, sign, line);
    write_row(call.dw_hh, call.w_hh.store, task * s.H, s.H, line);
    const int64_t ih_bias = gate == 2 ? kAn : gate == 1 ? kAu : kAr;
    const int64_t hh_bias = gate == 2 && !call.reset_before ? int64_t(kHn) : ih_bias;
    reduce(first.bias + ih_bias * s.Hp + unit, 1, sign, static_cast<T*>(call.db_ih) + task);
    reduce(first.bias + hh_bias * s.Hp + unit, 1, sign, static_cast<T*>(call.db_hh) + task);
  }

 private:
  // out[..n) = sign times the sum over the groups of what stands at `first` in the first one's sums.
  void reduce(const T* first, int64_t n, T sign, T* out) const {
    sum_groups(call.workspace, first, n, out);
    for (int64_t i = 0; i < n; ++i) out[i] *= sign;
  }

  void run_block(const Block& block, const Scratch& c, const Sums& sums) const {
    for (int64_t i = 0; i < block.count; ++i) {
      T* dh = c.dh + i * s.Hp;
      if (call.dh_n.data)
        gather_padded<L>(call.dh_n, block.rows[i].b * call.dh_n.s0, call.dh_n.s1, s.H, s.Hp, dh);
      else
        for (int64_t j = 0; j < s.Hp; ++j) dh[j] = 0;
    }
    int64_t chunks = 0;
    for (int64_t at = 0; at < block.longest(); at = block.chunk_from(at).last) c.starts[chunks++] = at;
    while (chunks > 0) run_chunk(block, block.chunk_from(c.starts[--chunks]), c, sums);
    for (int64_t i = 0; i < block.count; ++i) {
      const Row& row = block.rows[i];
      __builtin_memcpy(static_cast<T*>(call.dh0) + row.b * s.H, c.dh + i * s.Hp, s.H * sizeof(T));
      if (call.dx && !call.shared) zero_padding(call, call.dx, row.b, row.length, call.batch, s.I);
      if (call.da && !call.jagged)
        zero_rows(call.da, sizeof(T) == 8 ? Store::f64 : Store::f32, row.b * call.steps + row.length,
                  call.steps - row.length, 1);
    }
  }

  void run_chunk(const Block& block, const Chunk& chunk, const Scratch& c, const Sums& sums) const {
    gather(block, chunk, c);
    if (!call.gates) recompute(chunk.tokens, c);
    int64_t base = chunk.tokens, alive = 0;
    for (int64_t step = chunk.last - 1; step >= chunk.first; --step) {
      while (alive < block.count && block.rows[alive].length > step) ++alive;
      base -= alive;
      if (call.reset_before)
        step_before(block, step, alive, base, c);
      else
        step_after(block, step, alive, base, c);
    }
    sum_biases(chunk.tokens, c, sums);
    recurrent_products(chunk.tokens, c, sums);
    if (call.shared)
      leave_to_history(block, chunk, c);
    else
      input_products(chunk.tokens, c, sums);
    block.for_tokens(chunk, [&](const Row& row, int64_t, int64_t step, int64_t token) {
      if (call.dx && !call.shared)
        write_row(call.dx, call.x.store, (row.dx + step * call.dx_step) * s.I, s.I, c.dxs + token * s.Ip);
      if (call.da) static_cast<T*>(call.da)[row.da + step * call.da_step] = c.da[token];
    });
  }

  // x, h of the step before and the scalars of a chunk's tokens.
  void gather(const Block& block, const Chunk& chunk, const Scratch& c) const {
    const Array y{call.y, s.H, 1, 1, call.x.store};
    block.for_tokens(chunk, [&](const Row& row, int64_t, int64_t step, int64_t token) {
      c.scalars[token] = Scalars<T>(call, row, step);
      c.da[token] = 0;
      T* h = c.hs + token * s.Hp;
      if (step > 0)
        gather_padded<L>(y, (row.y + (step - 1) * call.y_step) * s.H, 1, s.H, s.Hp, h);
      else if (call.h0.data)
        gather_padded<L>(call.h0, row.b * call.h0.s0, call.h0.s1, s.H, s.Hp, h);
      else
        for (int64_t j = 0; j < s.Hp; ++j) h[j] = 0;
      if (!call.shared) gather_padded<L>(call.x, row.x + step * call.x_step, call.x.s2, s.I, s.Ip, c.xs + token * s.Ip);
      if (call.shared && !call.gates)  // the projection waits where the gates will stand
        copy_row(projected(row, step), 3 * s.Hp, c.gates + token * s.G);
    });
  }

  DIEN_INLINE const T* projected(const Row& row, int64_t step) const {
    return reinterpret_cast<const T*>(call.workspace.projection) + (row.dx + step * call.dx_step) * 3 * s.Hp;
  }

  // (1) to (6) for all tokens at once: their h_prev are known. Gates stand as [r | u | n | hn].
  void recompute(int64_t tokens, const Scratch& c) const {
    for (int64_t j = 0; j < s.units(); ++j)
      for_row_tiles(tokens, [&]<int M>(int64_t i) {
        const int64_t lane = j * L::N;
        V acc[M][3], xn[M];
        gate_inputs<M>(i, lane, acc, c);
        const V bias = L::load(w.bias_n + lane);
        for (int m = 0; m < M; ++m) xn[m] = acc[m][2], acc[m][2] = bias;
        const T* h = c.hs + i * s.Hp;
        if (call.reset_before) {
          V ru[M][2];
          for (int m = 0; m < M; ++m) ru[m][0] = acc[m][0], ru[m][1] = acc[m][1];
          multiply<L>(h, s.Hp, w.hh + j * s.H * 2 * L::N, s.H, ru);
          for (int m = 0; m < M; ++m) acc[m][0] = ru[m][0], acc[m][1] = ru[m][1];
        } else {
          multiply<L>(h, s.Hp, w.hh + j * s.H * 3 * L::N, s.H, acc);
        }
        for (int m = 0; m < M; ++m) {
          T* gates = c.gates + (i + m) * s.G + lane;
          V r = acc[m][0], u = acc[m][1];
          A::sigmoid2(r, u);
          L::store(gates, r);
          L::store(gates + s.Hp, u);
          L::store(gates + 3 * s.Hp, acc[m][2]);
          if (call.reset_before) {  // n waits for r * h of all units
            L::store(gates + 2 * s.Hp, xn[m]);
            L::store(c.q + (i + m) * s.Hp + lane, r * L::load(h + m * s.Hp + lane));
          } else {
            L::store(gates + 2 * s.Hp, A::tanh(xn[m] + r * acc[m][2]));
          }
        }
      });
    if (!call.reset_before) return;
    for (int64_t j = 0; j < s.units(); ++j)
      for_row_tiles(tokens, [&]<int M>(int64_t i) {
        T* n = c.gates + i * s.G + 2 * s.Hp + j * L::N;
        V acc[M][1];
        load_tile<L>(n, s.G, acc);
        multiply<L>(c.q + i * s.Hp, s.Hp, w.hh_n + j * s.H * L::N, s.H, acc);
        for (int m = 0; m < M; ++m) L::store(n + m * s.G, A::tanh(acc[m][0]));
      });
  }

  // (1) of M tokens at one unit block, from x or from the shared projection that `gather` left in place of the gates.
  template <int M>
  DIEN_INLINE void gate_inputs(int64_t i, int64_t lane, V (&acc)[M][3], const Scratch& c) const {
    V bias[3];
    for (int v = 0; v < 3; ++v) bias[v] = L::load(w.bias_x + v * s.Hp + lane);
    if (call.shared) {
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < 3; ++v) acc[m][v] = L::load(c.gates + (i + m) * s.G + v * s.Hp + lane);
    } else {
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < 3; ++v) acc[m][v] = V{};
      multiply<L>(c.xs + i * s.Ip, s.Ip, w.ih + lane * s.I * 3, s.I, acc);
    }
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < 3; ++v) acc[m][v] = c.scalars[i + m].gamma * acc[m][v] + bias[v];
  }

  // Asks for what the step before will read of a row: rows stand so far apart that the processor does not foresee it.
  DIEN_INLINE void prefetch_step(const Row& row, int64_t step) const {
    if (step < 0) return;
    if (call.gates) prefetch(kept_gates<T>(call, s.Hk, row, step), sizeof(T), 4 * s.Hk);
    if (call.dy.data) prefetch(call.dy.data, size_of(call.dy.store), s.H, row.dy + step * call.dy_step);
  }

  DIEN_INLINE void read_dy(const Row& row, int64_t step, const Scratch& c) const {
    if (call.dy.data) gather_padded<L>(call.dy, row.dy + step * call.dy_step, call.dy.s2, s.H, s.Hp, c.line);
  }

  // (21)
  DIEN_INLINE T attention_gradient(V dg, V u_dg) const {
    return T(call.alpha1) * L::sum(dg) + T(call.beta1) * L::sum(u_dg);
  }

  // (10) to (17) for the rows alive at one step, reset after the product.
  void step_after(const Block& block, int64_t step, int64_t alive, int64_t base, const Scratch& c) const {
    const int64_t segment = call.gates ? s.Hk : s.Hp;
    for (int64_t i = 0; i < alive; ++i) {
      const Scalars<T>& k = c.scalars[base + i];
      T *gates = c.gates + (base + i) * s.G, *dh = c.dh + i * s.Hp;
      const T* h = c.hs + (base + i) * s.Hp;
      const T* in = call.gates ? kept_gates<T>(call, s.Hk, block.rows[i], step) : gates;
      const auto gate = [&](int g, int64_t j) { return load_kept<L>(in + g * segment + j, segment - j); };
      prefetch_step(block.rows[i], step - 1);
      read_dy(block.rows[i], step, c);
      V dg_sum = {}, u_dg_sum = {};
      for (int64_t j = 0; j < s.Hp; j += L::N) {
        const V r = gate(0, j), u = gate(1, j), n = gate(2, j), hn = gate(3, j);
        V dh_j = L::load(dh + j);
        if (call.dy.data) dh_j += L::load(c.line + j);
        const auto d = step_gradient(dh_j, L::load(h + j), u, n, k.alpha, k.beta);
        L::store(gates + kAn * s.Hp + j, d.an);
        L::store(gates + kAr * s.Hp + j, reset_gradient(d.an * hn, r));
        L::store(gates + kAu * s.Hp + j, d.au);
        L::store(gates + kHn * s.Hp + j, d.an * r);
        L::store(dh + j, d.dh);
        const V dg = L::live(d.dg, s.H - j);
        dg_sum += dg;
        u_dg_sum += L::live(u, s.H - j) * dg;
      }
      c.da[base + i] = attention_gradient(dg_sum, u_dg_sum);
    }
    product<L, true>(c.gates + base * s.G + kAr * s.Hp, s.G, 3, s.Hp, w.columns_hh, s.H, s.units(), alive, c.dh, s.Hp);
  }

  // The same with the reset before the product: dq = W_hn^T an comes between. r moves to the unused place of hn.
  void step_before(const Block& block, int64_t step, int64_t alive, int64_t base, const Scratch& c) const {
    const int64_t segment = call.gates ? s.Hk : s.Hp;
    for (int64_t i = 0; i < alive; ++i) {
      const Scalars<T>& k = c.scalars[base + i];
      T *gates = c.gates + (base + i) * s.G, *dh = c.dh + i * s.Hp, *q = c.q + (base + i) * s.Hp;
      const T* h = c.hs + (base + i) * s.Hp;
      const T* in = call.gates ? kept_gates<T>(call, s.Hk, block.rows[i], step) : gates;
      const auto gate = [&](int g, int64_t j) { return load_kept<L>(in + g * segment + j, segment - j); };
      prefetch_step(block.rows[i], step - 1);
      read_dy(block.rows[i], step, c);
      V dg_sum = {}, u_dg_sum = {};
      for (int64_t j = 0; j < s.Hp; j += L::N) {
        const V r = gate(0, j), u = gate(1, j), n = gate(2, j);
        V dh_j = L::load(dh + j);
        if (call.dy.data) dh_j += L::load(c.line + j);
        const auto d = step_gradient(dh_j, L::load(h + j), u, n, k.alpha, k.beta);
        L::store(gates + kAn * s.Hp + j, d.an);
        L::store(gates + kAu * s.Hp + j, d.au);
        L::store(gates + kHn * s.Hp + j, r);
        L::store(q + j, r * L::load(h + j));
        L::store(dh + j, d.dh);
        const V dg = L::live(d.dg, s.H - j);
        dg_sum += dg;
        u_dg_sum += L::live(u, s.H - j) * dg;
      }
      c.da[base + i] = attention_gradient(dg_sum, u_dg_sum);
    }
    T* first = c.gates + base * s.G;
    product<L, false>(first + kAn * s.Hp, s.G, 1, s.Hp, w.columns_hn, s.H, s.units(), alive, c.dq, s.Hp);
    for (int64_t i = 0; i < alive; ++i) {
      T *gates = first + i * s.G, *dh = c.dh + i * s.Hp;
      const T *dq = c.dq + i * s.Hp, *h = c.hs + (base + i) * s.Hp;
      for (int64_t j = 0; j < s.Hp; j += L::N) {
        const V r = L::load(gates + kHn * s.Hp + j), dq_j = L::load(dq + j);
        L::store(gates + kAr * s.Hp + j, reset_gradient(dq_j * L::load(h + j), r));
        L::store(dh + j, L::load(dh + j) + dq_j * r);
      }
    }
    product<L, true>(first + kAr * s.Hp, s.G, 2, s.Hp, w.columns_hh, s.H, s.units(), alive, c.dh, s.Hp);
  }

  void sum_biases(int64_t tokens, const Scratch& c, const Sums& sums) const {
    for (int64_t j = 0; j < 4 * s.Hp; j += L::N) {
      V sum = {};
      for (int64_t t = 0; t < tokens; ++t) sum += L::load(c.gates + t * s.G + j);
      L::store(sums.bias + j, L::load(sums.bias + j) + sum);
    }
  }

  // (18)
  void recurrent_products(int64_t tokens, const Scratch& c, const Sums& sums) const {
    for (int64_t gate = 0; gate < 3; ++gate) {
      const bool before_n = gate == 2 && call.reset_before;
      const T* d = c.gates + (before_n ? int64_t(kAn) : kAr + gate) * s.Hp;
      product_transposed<L>(d, s.G, before_n ? c.q : c.hs, s.Hp, tokens, s.H, s.units(), sums.hh + gate * s.H * s.Hp,
                            s.Hp);
    }
  }

  // (19), (20) and (22) of tokens whose dgx stand in the gates and whose x stand in xs.
  void input_products(int64_t tokens, const Scratch& c, const Sums& sums) const {
    const int64_t vectors = s.Ip / L::N;
    const bool scale = call.scale_input && !call.shared;
    if (call.dx || scale) product<L, false>(c.gates, s.G, 3, s.Hp, w.columns_ih, s.H, vectors, tokens, c.dxs, s.Ip);
    if (scale)
      for (int64_t t = 0; t < tokens; ++t) {
        V dot = {};
        for (int64_t j = 0; j < s.Ip; j += L::N) {
          const V x = L::load(c.xs + t * s.Ip + j), dx = L::load(c.dxs + t * s.Ip + j);
          dot += x * L::live(dx, s.I - j);
          L::store(c.xs + t * s.Ip + j, c.scalars[t].gamma * x);
          L::store(c.dxs + t * s.Ip + j, c.scalars[t].gamma * dx);
        }
        c.da[t] += L::sum(dot);
      }
    for (int64_t gate = 0; gate < 3; ++gate)
      product_transposed<L>(c.gates + gate * s.Hp, s.G, c.xs, s.Ip, tokens, s.H, vectors, sums.ih + gate * s.H * s.Ip,
                            s.Ip);
  }

  // Shared histories: gamma dgx of every token waits for the other rows of its history; (22) needs no x.
  void leave_to_history(const Block& block, const Chunk& chunk, const Scratch& c) const {
    block.for_tokens(chunk, [&](const Row& row, int64_t, int64_t step, int64_t token) {
      T* out = reinterpret_cast<T*>(call.workspace.shared_gradient) + (row.y + step * call.y_step) * 3 * s.Hp;
      const T* in = c.gates + token * s.G;
      if (call.scale_input) {
        const T* projection = projected(row, step);  // gates r, u, n against gradients an, ar, au
        V dot = {};
        for (int64_t j = 0; j < s.Hp; j += L::N)
          dot += L::live(L::load(projection + j) * L::load(in + kAr * s.Hp + j) +
                             L::load(projection + s.Hp + j) * L::load(in + kAu * s.Hp + j) +
                             L::load(projection + 2 * s.Hp + j) * L::load(in + kAn * s.Hp + j),
                         s.H - j);
        c.da[token] += L::sum(dot);
      }
      for (int64_t j = 0; j < 3 * s.Hp; j += L::N) L::store(out + j, c.scalars[token].gamma * L::load(in + j));
    });
  }

  void sum_rows_of_history(int64_t u, int64_t step, T* out) const {
    const T* gradients = reinterpret_cast<const T*>(call.workspace.shared_gradient);
    for (int64_t j = 0; j < 3 * s.Hp; ++j) out[j] = 0;
    for (int64_t r = call.first_of_history[u]; r < call.first_of_history[u + 1]; ++r) {
      const T* in = gradients + (call.by_index[call.rows_of_history[r]].y + step * call.y_step) * 3 * s.Hp;
      for (int64_t j = 0; j < 3 * s.Hp; j += L::N) L::store(out + j, L::load(out + j) + L::load(in + j));
    }
  }
};
