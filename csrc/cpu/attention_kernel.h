// Attention scores, equations (A1) to (A13) of docs/math-attention.md. Included inside an instruction set's namespace.
//
// One target at a time, its valid steps gathered into dense tokens. The first layer of din is one product a step, by (A5):
// the matrix of a target costs two operations a weight, as much as one more step. The backward goes by histories, so that
// the targets of one add their gradients in order; it computes the activations again.
//
// Names as on that page: r = (W_q + W_d) q + b_1 has the matrix W_r = W_q + W_d, and steps have W_k - W_d, here W_k, and
// W_p. A bilinear call has W_r = W alone, or no matrix at all, and then r is v of (A1).

template <class L>
struct Attention {
  using T = typename L::Scalar;
  using V = typename L::V;
  using Layers = Tail<L>;

  // Sizes: padded state and target; the first layer's outputs, as they are and padded.
  struct Shape {
    int64_t Hp, Dp, out, width;
    explicit Shape(const AttentionCall& call)
        : Hp(round_up(call.hidden, L::N)),
          Dp(round_up(call.size, L::N)),
          out(call.bilinear ? call.hidden : call.mlp.layers[0].out),
          width(round_up(out, L::N)) {}
  };

  // The weights in the compute dtype: `forward` for products of rows of q or k with W^T, `backward` for products of rows
  // of gradients with W, `rows` as they are, padded.
  struct Packed {
    T *r_forward, *r_rows;
    T *k_forward, *k_backward;
    T *p_forward, *p_backward, *p_rows;
    T* zeros;                               // [width]: the bias of a bilinear call
    T* plain;                               // room for twice the largest matrix
    const typename Layers::Packed* layers;  // din
    Packed(const AttentionCall& call, const Shape& s, Arena& arena) {
      const int64_t din = call.bilinear ? 0 : 1, any = call.mlp.count > 0 ? 1 : 0, derive = call.backward ? 1 : 0;
      layers = din ? Layers::template take_layers<typename Layers::Packed>(call.mlp, arena, call.backward) : nullptr;
      r_forward = arena.take<T>(any * call.size * s.width);
      r_rows = arena.take<T>(any * derive * s.out * s.Dp);
      k_forward = arena.take<T>(din * call.hidden * s.width);
      p_forward = arena.take<T>(din * call.hidden * s.width);
      k_backward = arena.take<T>(din * derive * s.out * s.Hp);
      p_backward = arena.take<T>(din * derive * s.out * s.Hp);
      p_rows = arena.take<T>(din * derive * s.out * s.Hp);
      zeros = arena.take<T>(s.width);
      plain = arena.take<T>(2 * Layers::largest(call.mlp));
    }
  };

  // A group's gradient sums (A9) of W_r [out][Dp], of W_k and W_p [out][Hp], and of the layers.
  struct Sums {
    T *r, *k, *p;
    const typename Layers::Sums* layers;
    Sums(const AttentionCall& call, const Shape& s, Arena& arena) {
      const int64_t din = call.bilinear ? 0 : 1, any = call.mlp.count > 0 ? 1 : 0;
      layers = din ? Layers::template take_layers<typename Layers::Sums>(call.mlp, arena) : nullptr;
      r = arena.take<T>(any * s.out * s.Dp);
      k = arena.take<T>(din * s.out * s.Hp);
      p = arena.take<T>(din * s.out * s.Hp);
    }
  };

  // What a thread works in; a name with a d in front is the derivative by the value behind it.
  struct Scratch {
    // of a target
    T *q, *dq, *r, *dr;
    T *matrix_forward, *matrix_backward;  // W_k + W_p diag(q), packed as W_k is
    T* g;                                 // G of (A12), [out][Hp]
    T* e;                                 // logits, or their derivatives, of its valid steps
    int64_t* steps;                       // which steps these are
    // of a chunk of its steps
    T *keys, *dkeys, *x, *d;
    const typename Layers::Values* layers;
    T* dstates;  // of a history
    T* line;     // a row of a matrix, while the groups are added up
    Scratch(const AttentionCall& call, const Shape& s, Arena& arena) {
      const int64_t tokens = call.chunk_tokens, din = call.bilinear ? 0 : 1, derive = call.backward ? 1 : 0;
      layers = din ? Layers::template take_layers<typename Layers::Values>(call.mlp, arena, tokens) : nullptr;
      q = arena.take<T>(s.Dp);
      dq = arena.take<T>(derive * s.Dp);
      r = arena.take<T>(s.width);
      dr = arena.take<T>(derive * s.width);
      matrix_forward = arena.take<T>(din * call.hidden * s.width);
      matrix_backward = arena.take<T>(din * derive * s.out * s.Hp);
      g = arena.take<T>(din * derive * s.out * s.Hp);
      keys = arena.take<T>(tokens * s.Hp);
      dkeys = arena.take<T>(derive * tokens * s.Hp);
      dstates = arena.take<T>(derive * call.longest * s.Hp);
      e = arena.take<T>(call.longest);
      steps = arena.take<int64_t>(call.longest);
      x = arena.take<T>(tokens);
      d = arena.take<T>(derive * 2 * tokens * Layers::widest(call.mlp));
      line = arena.take<T>(derive * (4 * s.Hp + s.Dp + Layers::widest(call.mlp)));
    }
  };

  const AttentionCall& call;
  const Layers tail;
  const Shape s;
  const Packed w;

  static Sizes sizes(const AttentionCall& call) {
    const Shape s(call);
    const int64_t sums = call.backward ? bytes_of<Sums>(call, s) : 0;
    return {bytes_of<Packed>(call, s), sums, bytes_of<Scratch>(call, s), 0};
  }

  static void run(const AttentionCall& call) {
    Arena packed{call.workspace.packed};
    const Attention kernel(call, packed);
    kernel.fill();
    if (call.backward)
      kernel.backward();
    else
      kernel.forward();
  }

 private:
  static constexpr int64_t kTargets = 8;  // of one task of the forward

  Attention(const AttentionCall& c, Arena& packed) : call(c), tail{c.mlp}, s(c), w(c, s, packed) {}

  static int64_t vectors(int64_t padded) { return padded / L::N; }

  void forward() const {
    run_tasks(call, (call.batch + kTargets - 1) / kTargets, [&](char* memory, int64_t task) {
      Arena scratch{memory};
      const Scratch c(call, s, scratch);
      const int64_t from = task * kTargets;
      for (int64_t b = from; b < from + kTargets && b < call.batch; ++b) run_target(b, c);
    });
  }

  void backward() const {
    const int64_t groups = call.workspace.groups, each = (call.histories + groups - 1) / groups;
    run_tasks(call, groups, [&](char* memory, int64_t g) {
      Arena scratch{memory}, group_sums{sums_of(call.workspace, g)};
      const Scratch c(call, s, scratch);
      __builtin_memset(sums_of(call.workspace, g), 0, call.workspace.sizes.sums);
      const Sums sums(call, s, group_sums);
      for (int64_t u = g * each; u < (g + 1) * each && u < call.histories; ++u) run_history(u, c, sums);
    });
    reduce();
  }

  void fill() const {
    for (int64_t j = 0; j < s.width; ++j) w.zeros[j] = 0;
    if (call.mlp.count == 0) return;
    const Layer& first = call.mlp.layers[0];
    const int64_t H = call.hidden;
    if (!call.bilinear) tail.fill(w.layers, w.plain, call.backward);
    T *plain = w.plain, *transposed = plain + first.in * first.out;
    read_rows(first.weight, first.out, first.in, plain);
    if (!call.bilinear)  // (A4): [W_q | W_k | W_d | W_p] becomes [W_q + W_d | W_k - W_d | W_d | W_p]
      for (int64_t o = 0; o < s.out; ++o) {
        T* row = plain + o * first.in;
        for (int64_t i = 0; i < H; ++i) {
          row[i] += row[2 * H + i];
          row[H + i] -= row[2 * H + i];
        }
      }
    pack_matrix<L>(plain, first.in, s.out, call.size, transposed, w.r_forward, nullptr);
    if (call.backward) copy_padded(plain, first.in, call.size, s.Dp, w.r_rows);
    if (call.bilinear) return;
    pack_matrix<L>(plain + H, first.in, s.out, H, transposed, w.k_forward, call.backward ? w.k_backward : nullptr);
    pack_matrix<L>(plain + 3 * H, first.in, s.out, H, transposed, w.p_forward, call.backward ? w.p_backward : nullptr);
    if (call.backward) copy_padded(plain + 3 * H, first.in, H, s.Hp, w.p_rows);
  }

  // Rows of the first layer with zeros up to their padded size.
  void copy_padded(const T* in, int64_t stride, int64_t n, int64_t padded, T* to) const {
    for (int64_t o = 0; o < s.out; ++o)
      for (int64_t i = 0; i < padded; ++i) to[o * padded + i] = i < n ? in[o * stride + i] : T(0);
  }

  // q, r and the matrices of a target; writes which steps are valid, and returns how many.
  int64_t prepare(int64_t b, const Scratch& c) const {
    const Target& t = call.targets[b];
    int64_t n = 0;
    for (int64_t i = 0; i < t.length; ++i)
      if (!call.mask || call.mask[t.mask + i * call.mask_step]) c.steps[n++] = i;
    if (n == 0) return 0;
    gather_padded<L>(call.target, b * call.target.s0, call.target.s1, call.size, s.Dp, c.q);
    if (call.mlp.count == 0) {
      __builtin_memcpy(c.r, c.q, s.Dp * sizeof(T));
      return n;
    }
    const T* bias = call.bilinear ? w.zeros : w.layers[0].bias;
    affine<L>(c.q, s.Dp, w.r_forward, call.size, bias, 0, vectors(s.width), 1, c.r, s.width);
    for (int64_t j = s.out; j < s.width; ++j) c.r[j] = 0;  // an infinite target left NaN there
    if (!call.bilinear) make_matrices(c);
    return n;
  }

  // (A5): W_k + W_p diag(q) in the orders of the forward and of the backward.
  void make_matrices(const Scratch& c) const {
    const T *k = w.k_forward, *p = w.p_forward;
    T* matrix = c.matrix_forward;
    for_column_tiles(vectors(s.width), [&]<int NV>(int64_t) {
      for (int64_t i = 0; i < call.hidden; ++i, k += NV * L::N, p += NV * L::N, matrix += NV * L::N)
        for (int v = 0; v < NV; ++v)
          L::store(matrix + v * L::N, L::load(k + v * L::N) + c.q[i] * L::load(p + v * L::N));
    });
    if (!call.backward) return;
    k = w.k_backward, p = w.p_backward, matrix = c.matrix_backward;
    for_column_tiles(vectors(s.Hp), [&]<int NV>(int64_t first) {
      for (int64_t o = 0; o < s.out; ++o, k += NV * L::N, p += NV * L::N, matrix += NV * L::N)
        for (int v = 0; v < NV; ++v)
          L::store(matrix + v * L::N,
                   L::load(k + v * L::N) + L::load(c.q + (first + v) * L::N) * L::load(p + v * L::N));
    });
  }

  void gather_keys(const Target& t, const int64_t* steps, int64_t n, const Scratch& c) const {
    for (int64_t i = 0; i < n; ++i)
      gather_padded<L>(call.states, t.states + steps[i] * call.states.s1, call.states.s2, call.hidden, s.Hp,
                       c.keys + i * s.Hp);
  }

  // f(first token, tokens) for chunks of a target's n valid steps.
  template <class F>
  void for_chunks(int64_t n, F&& f) const {
    for (int64_t from = 0; from < n; from += call.chunk_tokens)
      f(from, n - from < call.chunk_tokens ? n - from : call.chunk_tokens);
  }

  // (A1), (A2) without the scale: x of a chunk's keys.
  void logits(int64_t n, const Scratch& c, T* x) const {
    if (call.bilinear) {
      for (int64_t i = 0; i < n; ++i) {
        V sum{};
        for (int64_t j = 0; j < s.Hp; j += L::N) sum += L::load(c.keys + i * s.Hp + j) * L::load(c.r + j);
        x[i] = L::sum(sum);
      }
      return;
    }
    affine<L>(c.keys, s.Hp, c.matrix_forward, call.hidden, c.r, 0, vectors(s.width), n, c.layers[0].z, s.width);
    tail.forward(w.layers, c.layers, n, x);
  }

  void run_target(int64_t b, const Scratch& c) const {
    const Target& t = call.targets[b];
    const int64_t n = prepare(b, c);
    for_chunks(n, [&](int64_t from, int64_t tokens) {
      gather_keys(t, c.steps + from, tokens, c);
      logits(tokens, c, c.e + from);
    });
    for (int64_t i = 0; i < n; ++i) c.e[i] *= T(call.scale);
    if (call.softmax && n > 0) softmax(c.e, n);
    T* scores = static_cast<T*>(call.scores) + t.scores;
    for (int64_t i = 0; i < n; ++i) scores[c.steps[i]] = c.e[i];
  }

  // (A3)
  static void softmax(T* e, int64_t n) {
    T top = e[0], total = 0;
    for (int64_t i = 1; i < n; ++i) top = e[i] > top ? e[i] : top;
    for (int64_t i = 0; i < n; ++i) total += e[i] = exponential(e[i] - top);
    for (int64_t i = 0; i < n; ++i) e[i] /= total;
  }

  void run_history(int64_t u, const Scratch& c, const Sums& sums) const {
    const int64_t first = call.first_of_history[u], last = call.first_of_history[u + 1];
    const int64_t row = call.state_rows[u], rows = call.state_rows[u + 1] - row;
    const int64_t length = first < last ? call.targets[call.rows_of_history[first]].length : 0;
    for (int64_t i = 0; i < length * s.Hp; ++i) c.dstates[i] = 0;
    for (int64_t i = first; i < last; ++i) target_backward(call.rows_of_history[i], c, sums);
    for (int64_t t = 0; t < length; ++t)
      write_row(call.dstates, call.states.store, (row + t) * call.hidden, call.hidden, c.dstates + t * s.Hp);
    zero_rows(call.dstates, call.states.store, row + length, rows - length, call.hidden);
  }

  // Adds a target's gradients to the history's and to the group's sums, and writes its own.
  void target_backward(int64_t b, const Scratch& c, const Sums& sums) const {
    const Target& t = call.targets[b];
    const int64_t n = prepare(b, c);
    for (int64_t i = 0; i < s.Dp; ++i) c.dq[i] = 0;
    for (int64_t j = 0; j < s.width; ++j) c.dr[j] = 0;
    for (int64_t i = 0; !call.bilinear && i < s.out * s.Hp; ++i) c.g[i] = 0;
    read_de(t, n, c);
    for_chunks(n, [&](int64_t from, int64_t tokens) {
      gather_keys(t, c.steps + from, tokens, c);
      if (call.bilinear)
        bilinear_chunk(tokens, c.e + from, c);
      else
        din_chunk(tokens, c.e + from, c, sums);
      for (int64_t i = 0; i < tokens; ++i) {
        T* to = c.dstates + c.steps[from + i] * s.Hp;
        for (int64_t j = 0; j < s.Hp; j += L::N) L::store(to + j, L::load(to + j) + L::load(c.dkeys + i * s.Hp + j));
      }
    });
    if (n > 0) target_sums(c, sums);
    write_row(call.dtarget, call.target.store, b * call.size, call.size, c.dq);
  }

  // (A13), with the scale.
  void read_de(const Target& t, int64_t n, const Scratch& c) const {
    const T* a = static_cast<const T*>(call.scores) + t.scores;
    const int64_t* steps = c.steps;
    T *de = c.e, dot = 0;
    for (int64_t i = 0; i < n; ++i) {
      de[i] = read_one<T>(call.da, t.da + steps[i] * call.da.s1);
      dot += a[steps[i]] * de[i];
    }
    for (int64_t i = 0; i < n; ++i) de[i] = T(call.scale) * (call.softmax ? a[steps[i]] * (de[i] - dot) : de[i]);
  }

  // (A6): dr is the derivative by v.
  void bilinear_chunk(int64_t n, const T* de, const Scratch& c) const {
    for (int64_t j = 0; j < s.Hp; j += L::N) {
      const V v = L::load(c.r + j);
      V sum = L::load(c.dr + j);
      for (int64_t i = 0; i < n; ++i) {
        sum += de[i] * L::load(c.keys + i * s.Hp + j);
        L::store(c.dkeys + i * s.Hp + j, de[i] * v);
      }
      L::store(c.dr + j, sum);
    }
  }

  // (A7), (A8), G and the keys' derivative of (A12).
  void din_chunk(int64_t n, const T* de, const Scratch& c, const Sums& sums) const {
    logits(n, c, c.x);
    const T* dz = tail.backward(w.layers, c.layers, n, de, c.d, sums.layers);
    add_column_sums<L>(dz, s.width, n, s.width, c.dr);
    product_transposed<L>(dz, s.width, c.keys, s.Hp, n, s.out, vectors(s.Hp), c.g, s.Hp);
    product<L, false>(dz, s.width, 1, 0, c.matrix_backward, s.out, vectors(s.Hp), n, c.dkeys, s.Hp);
  }

  // (A9), (A12): what the weights and the target get from one target.
  void target_sums(const Scratch& c, const Sums& sums) const {
    if (call.mlp.count == 0) {
      __builtin_memcpy(c.dq, c.dr, s.Dp * sizeof(T));
      return;
    }
    for (int64_t o = 0; o < s.out; ++o) {
      const T dr = c.dr[o];
      for (int64_t j = 0; j < s.Dp; j += L::N) {
        T* sum = sums.r + o * s.Dp + j;
        L::store(sum, L::load(sum) + dr * L::load(c.q + j));
        L::store(c.dq + j, L::load(c.dq + j) + dr * L::load(w.r_rows + o * s.Dp + j));
      }
      for (int64_t j = 0; !call.bilinear && j < s.Hp; j += L::N) {
        const int64_t at = o * s.Hp + j;
        const V g = L::load(c.g + at);
        L::store(sums.k + at, L::load(sums.k + at) + g);
        L::store(sums.p + at, L::load(sums.p + at) + g * L::load(c.q + j));
        L::store(c.dq + j, L::load(c.dq + j) + g * L::load(w.p_rows + at));
      }
    }
    if (call.bilinear) return;
    T* db = sums.layers[0].bias;
    for (int64_t j = 0; j < s.width; j += L::N) L::store(db + j, L::load(db + j) + L::load(c.dr + j));
  }

  // The weights' gradients: the groups in order; by (A9) W_d gets what W_r has and W_k has not.
  void reduce() const {
    if (call.mlp.count == 0) return;
    Arena scratch{call.workspace.scratch}, first_sums{sums_of(call.workspace, 0)};
    T* line = Scratch(call, s, scratch).line;
    const Sums sums(call, s, first_sums);
    const Layer& first = call.mlp.layers[0];
    for (int64_t o = 0; o < s.out; ++o) {
      sum_groups(call.workspace, sums.r + o * s.Dp, call.size, line);
      if (!call.bilinear) {
        T *k = line + call.hidden, *d = k + call.hidden, *p = d + call.hidden;
        sum_groups(call.workspace, sums.k + o * s.Hp, call.hidden, k);
        for (int64_t j = 0; j < call.hidden; ++j) d[j] = line[j] - k[j];
        sum_groups(call.workspace, sums.p + o * s.Hp, call.hidden, p);
      }
      write_row(first.dweight, call.mlp.gradients, o * first.in, first.in, line);
    }
    if (!call.bilinear) tail.reduce(call.workspace, sums.layers, line);
  }
};
