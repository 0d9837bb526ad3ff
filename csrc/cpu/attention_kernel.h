// Attention scores, equations (A1) to (A13) of docs/math-attention.md. Included inside an instruction set's namespace.
//
// One target at a time, its valid steps gathered into dense tokens. The first layer of din is one product a step, by (A5):
// the matrix of a target costs two operations a weight, as much as one more step. The backward goes by histories, so that
// the targets of one add their gradients in order; it computes the activations again.

template <class L>
struct Attention {
  using T = typename L::Scalar;
  using V = typename L::V;

  const AttentionJob& job;
  const Tail<L> tail;
  const int64_t Hp, Dp, out, width;  // padded state and target; first layer's outputs, as they are and padded

  explicit Attention(const AttentionJob& j)
      : job(j),
        tail{j.mlp},
        Hp(round_up(j.hidden, L::N)),
        Dp(round_up(j.size, L::N)),
        out(j.bilinear ? j.hidden : j.mlp.layers[0].out),
        width(round_up(out, L::N)) {}

  static void lay_out(AttentionJob& job) {
    Room& room = job.room;
    const int64_t tokens = job.chunk_tokens, din = job.bilinear ? 0 : 1, back = job.backward ? 1 : 0;
    const int64_t weights = job.bilinear && job.mlp.count == 0 ? 0 : 1;
    if (din) Tail<L>::lay_out(job.mlp, tokens, job.backward, room);
    const Attention k(job);
    job.row_forward_at = take<T>(room.packed_bytes, weights * job.size * k.width);
    job.row_rows_at = take<T>(room.packed_bytes, weights * back * k.out * k.Dp);
    job.step_forward_at = take<T>(room.packed_bytes, din * job.hidden * k.width);
    job.p_forward_at = take<T>(room.packed_bytes, din * job.hidden * k.width);
    job.step_backward_at = take<T>(room.packed_bytes, din * back * k.out * k.Hp);
    job.p_backward_at = take<T>(room.packed_bytes, din * back * k.out * k.Hp);
    job.p_rows_at = take<T>(room.packed_bytes, din * back * k.out * k.Hp);
    job.zero_at = take<T>(room.packed_bytes, k.width);
    job.plain_at = take<T>(room.packed_bytes, 2 * Tail<L>::largest(job.mlp));
    job.drow_at = take<T>(room.partial_bytes, weights * back * k.out * k.Dp);
    job.dstep_at = take<T>(room.partial_bytes, din * back * k.out * k.Hp);
    job.dp_at = take<T>(room.partial_bytes, din * back * k.out * k.Hp);
    job.q_at = take<T>(room.scratch_bytes, k.Dp);
    job.dq_at = take<T>(room.scratch_bytes, back * k.Dp);
    job.r_at = take<T>(room.scratch_bytes, k.width);
    job.dr_at = take<T>(room.scratch_bytes, back * k.width);
    job.matrix_at = take<T>(room.scratch_bytes, din * (job.hidden * k.width + back * k.out * k.Hp));
    job.dmatrix_at = take<T>(room.scratch_bytes, din * back * k.out * k.Hp);
    job.keys_at = take<T>(room.scratch_bytes, tokens * k.Hp);
    job.dkeys_at = take<T>(room.scratch_bytes, back * tokens * k.Hp);
    job.sum_at = take<T>(room.scratch_bytes, back * job.longest * k.Hp);
    job.e_at = take<T>(room.scratch_bytes, job.longest);
    job.steps_at = take<int64_t>(room.scratch_bytes, job.longest);
    job.x_at = take<T>(room.scratch_bytes, tokens);
    job.d_at = take<T>(room.scratch_bytes, back * 2 * tokens * Tail<L>::widest(job.mlp));
    job.line_at = take<T>(room.scratch_bytes, 4 * k.Hp + k.Dp + Tail<L>::widest(job.mlp));
  }

  static void run(const AttentionJob& job) {
    const Attention k(job);
    k.fill();
    const Room& room = job.room;
    if (!job.backward) {
      run_tasks(job.threads, room.scratch, room.scratch_bytes, (job.batch + kTargets - 1) / kTargets,
                [&](char* scratch, int64_t task) {
                  const int64_t from = task * kTargets;
                  for (int64_t b = from; b < from + kTargets && b < job.batch; ++b) k.run_target(scratch, b);
                });
      return;
    }
    const int64_t each = (job.histories + room.groups - 1) / room.groups;
    run_tasks(job.threads, room.scratch, room.scratch_bytes, room.groups, [&](char* scratch, int64_t g) {
      char* sums = room.partial + g * room.partial_bytes;
      __builtin_memset(sums, 0, room.partial_bytes);
      for (int64_t u = g * each; u < (g + 1) * each && u < job.histories; ++u)
        k.run_history(scratch, reinterpret_cast<T*>(sums), u);
    });
    k.reduce();
  }

 private:
  static constexpr int64_t kTargets = 8;  // of one task of the forward

  T* packed() const { return reinterpret_cast<T*>(job.room.packed); }
  int64_t vectors(int64_t padded) const { return padded / L::N; }

  void fill() const {
    T *w = packed(), *plain = w + job.plain_at;
    for (int64_t j = 0; j < width; ++j) w[job.zero_at + j] = 0;
    if (job.mlp.count == 0) return;
    const Layer& first = job.mlp.layers[0];
    if (!job.bilinear) tail.fill(w, plain, job.backward);
    T* transposed = plain + first.in * first.out;
    read_rows(first.weight, first.out, first.in, plain);
    if (!job.bilinear)  // [W_q | W_k | W_d | W_p] becomes [W_q + W_d | W_k - W_d | W_d | W_p]
      for (int64_t o = 0; o < out; ++o) {
        T* row = plain + o * first.in;
        for (int64_t i = 0; i < job.hidden; ++i) {
          row[i] += row[2 * job.hidden + i];
          row[job.hidden + i] -= row[2 * job.hidden + i];
        }
      }
    pack_matrix<L>(plain, first.in, out, job.size, transposed, w + job.row_forward_at, nullptr);
    if (job.backward) read_padded(plain, first.in, job.size, Dp, w + job.row_rows_at);
    if (job.bilinear) return;
    pack_matrix<L>(plain + job.hidden, first.in, out, job.hidden, transposed, w + job.step_forward_at,
                   job.backward ? w + job.step_backward_at : nullptr);
    pack_matrix<L>(plain + 3 * job.hidden, first.in, out, job.hidden, transposed, w + job.p_forward_at,
                   job.backward ? w + job.p_backward_at : nullptr);
    if (job.backward) read_padded(plain + 3 * job.hidden, first.in, job.hidden, Hp, w + job.p_rows_at);
  }

  void read_padded(const T* in, int64_t stride, int64_t n, int64_t padded, T* to) const {
    for (int64_t o = 0; o < out; ++o)
      for (int64_t i = 0; i < padded; ++i) to[o * padded + i] = i < n ? in[o * stride + i] : T(0);
  }

  // What one target needs before its steps; returns how many steps are valid, and writes which.
  int64_t prepare(T* s, int64_t b) const {
    const Target& t = job.targets[b];
    int64_t* steps = reinterpret_cast<int64_t*>(s) + job.steps_at;
    int64_t n = 0;
    for (int64_t i = 0; i < t.length; ++i)
      if (!job.mask || job.mask[t.mask + i * job.mask_step]) steps[n++] = i;
    if (n == 0) return 0;
    const T* w = packed();
    T *q = s + job.q_at, *r = s + job.r_at;
    gather_padded<L>(job.target, b * job.target.s0, job.target.s1, job.size, Dp, q);
    if (job.mlp.count == 0) {
      __builtin_memcpy(r, q, Dp * sizeof(T));
      return n;
    }
    affine<L>(q, Dp, w + job.row_forward_at, job.size, w + (job.bilinear ? job.zero_at : job.mlp.layers[0].bias_at), 0,
              vectors(width), 1, r, width);
    for (int64_t j = out; j < width; ++j) r[j] = 0;  // an infinite target left NaN there
    if (!job.bilinear) make_matrices(q, s + job.matrix_at);
    return n;
  }

  // (A5): (W_k - W_d) + W_p diag(q), in the orders of the forward and, behind it, of the backward.
  void make_matrices(const T* q, T* matrix) const {
    const T *step = packed() + job.step_forward_at, *p = packed() + job.p_forward_at;
    for_column_tiles(vectors(width), [&]<int NV>(int64_t) {
      for (int64_t k = 0; k < job.hidden; ++k, step += NV * L::N, p += NV * L::N, matrix += NV * L::N)
        for (int v = 0; v < NV; ++v)
          L::store(matrix + v * L::N, L::load(step + v * L::N) + q[k] * L::load(p + v * L::N));
    });
    if (!job.backward) return;
    step = packed() + job.step_backward_at, p = packed() + job.p_backward_at;
    for_column_tiles(vectors(Hp), [&]<int NV>(int64_t first) {
      for (int64_t o = 0; o < out; ++o, step += NV * L::N, p += NV * L::N, matrix += NV * L::N)
        for (int v = 0; v < NV; ++v)
          L::store(matrix + v * L::N,
                   L::load(step + v * L::N) + L::load(q + (first + v) * L::N) * L::load(p + v * L::N));
    });
  }

  void gather_keys(T* s, const Target& t, const int64_t* steps, int64_t n) const {
    for (int64_t i = 0; i < n; ++i)
      gather_padded<L>(job.states, t.states + steps[i] * job.states.s1, job.states.s2, job.hidden, Hp,
                       s + job.keys_at + i * Hp);
  }

  // f(first token, tokens) for chunks of a target's n valid steps.
  template <class F>
  void for_chunks(int64_t n, F&& f) const {
    for (int64_t from = 0; from < n; from += job.chunk_tokens)
      f(from, n - from < job.chunk_tokens ? n - from : job.chunk_tokens);
  }

  // (A1), (A2) without the scale: x of a chunk's keys.
  void logits(T* s, int64_t n, T* x) const {
    const T *keys = s + job.keys_at, *r = s + job.r_at;
    if (job.bilinear) {
      for (int64_t i = 0; i < n; ++i) {
        V sum{};
        for (int64_t j = 0; j < Hp; j += L::N) sum += L::load(keys + i * Hp + j) * L::load(r + j);
        x[i] = L::sum(sum);
      }
      return;
    }
    affine<L>(keys, Hp, s + job.matrix_at, job.hidden, r, 0, vectors(width), n, s + job.mlp.layers[0].z_at, width);
    tail.forward(packed(), s, n, x);
  }

  void run_target(char* memory, int64_t b) const {
    T* s = reinterpret_cast<T*>(memory);
    const Target& t = job.targets[b];
    const int64_t n = prepare(s, b), *steps = reinterpret_cast<int64_t*>(s) + job.steps_at;
    T* e = s + job.e_at;
    for_chunks(n, [&](int64_t from, int64_t tokens) {
      gather_keys(s, t, steps + from, tokens);
      logits(s, tokens, e + from);
    });
    for (int64_t i = 0; i < n; ++i) e[i] *= T(job.scale);
    if (job.softmax && n > 0) softmax(e, n);
    T* scores = static_cast<T*>(job.scores) + t.scores;
    for (int64_t i = 0; i < n; ++i) scores[steps[i]] = e[i];
  }

  // (A3)
  static void softmax(T* e, int64_t n) {
    T top = e[0], total = 0;
    for (int64_t i = 1; i < n; ++i) top = e[i] > top ? e[i] : top;
    for (int64_t i = 0; i < n; ++i) total += e[i] = exponential(e[i] - top);
    for (int64_t i = 0; i < n; ++i) e[i] /= total;
  }

  void run_history(char* memory, T* sums, int64_t u) const {
    T* s = reinterpret_cast<T*>(memory);
    const int64_t first = job.first_reader[u], last = job.first_reader[u + 1];
    const int64_t row = job.state_rows[u], rows = job.state_rows[u + 1] - row;
    const int64_t length = first < last ? job.targets[job.readers[first]].length : 0;
    T* sum = s + job.sum_at;
    for (int64_t i = 0; i < length * Hp; ++i) sum[i] = 0;
    for (int64_t i = first; i < last; ++i) target_backward(s, sums, job.readers[i]);
    for (int64_t t = 0; t < length; ++t)
      write_row(job.dstates, job.states.store, (row + t) * job.hidden, job.hidden, sum + t * Hp);
    zero_rows(job.dstates, job.states.store, row + length, rows - length, job.hidden);
  }

  // Adds a target's gradients: to dtarget, to the history's at sum_at, to the group's sums.
  void target_backward(T* s, T* sums, int64_t b) const {
    const Target& t = job.targets[b];
    const int64_t n = prepare(s, b), *steps = reinterpret_cast<int64_t*>(s) + job.steps_at;
    T *dq = s + job.dq_at, *dr = s + job.dr_at, *de = s + job.e_at;
    for (int64_t i = 0; i < Dp; ++i) dq[i] = 0;
    for (int64_t j = 0; j < width; ++j) dr[j] = 0;
    for (int64_t i = 0; !job.bilinear && i < out * Hp; ++i) s[job.dmatrix_at + i] = 0;
    read_de(t, steps, n, de);
    for_chunks(n, [&](int64_t from, int64_t tokens) {
      gather_keys(s, t, steps + from, tokens);
      if (job.bilinear)
        bilinear_chunk(s, tokens, de + from);
      else
        din_chunk(s, sums, tokens, de + from);
      for (int64_t i = 0; i < tokens; ++i) {
        T* to = s + job.sum_at + steps[from + i] * Hp;
        const T* dk = s + job.dkeys_at + i * Hp;
        for (int64_t j = 0; j < Hp; j += L::N) L::store(to + j, L::load(to + j) + L::load(dk + j));
      }
    });
    if (n > 0) target_sums(s, sums);
    write_row(job.dtarget, job.target.store, b * job.size, job.size, dq);
  }

  // (A13), with the scale.
  void read_de(const Target& t, const int64_t* steps, int64_t n, T* de) const {
    const T* a = static_cast<const T*>(job.scores) + t.scores;
    T dot = 0;
    for (int64_t i = 0; i < n; ++i) {
      de[i] = read_one<T>(job.da, t.da + steps[i] * job.da.s1);
      dot += a[steps[i]] * de[i];
    }
    for (int64_t i = 0; i < n; ++i) de[i] = T(job.scale) * (job.softmax ? a[steps[i]] * (de[i] - dot) : de[i]);
  }

  // (A6): dr is the derivative by v.
  void bilinear_chunk(T* s, int64_t n, const T* de) const {
    for (int64_t j = 0; j < Hp; j += L::N) {
      const V v = L::load(s + job.r_at + j);
      V sum = L::load(s + job.dr_at + j);
      for (int64_t i = 0; i < n; ++i) {
        sum += de[i] * L::load(s + job.keys_at + i * Hp + j);
        L::store(s + job.dkeys_at + i * Hp + j, de[i] * v);
      }
      L::store(s + job.dr_at + j, sum);
    }
  }

  // (A7), (A8), G_b and the keys' derivative of (A12).
  void din_chunk(T* s, T* sums, int64_t n, const T* de) const {
    logits(s, n, s + job.x_at);
    const T* dz = tail.backward(packed(), s, n, de, s + job.d_at, sums);
    add_column_sums<L>(dz, width, n, width, s + job.dr_at);
    product_transposed<L>(dz, width, s + job.keys_at, Hp, n, out, vectors(Hp), s + job.dmatrix_at, Hp);
    product<L, false>(dz, width, 1, 0, s + job.matrix_at + job.hidden * width, out, vectors(Hp), n, s + job.dkeys_at,
                      Hp);
  }

  // (A9), (A12): what the weights and the target get from one target.
  void target_sums(T* s, T* sums) const {
    const T *q = s + job.q_at, *dr = s + job.dr_at, *w = packed();
    T* dq = s + job.dq_at;
    if (job.mlp.count == 0) {
      __builtin_memcpy(dq, dr, Dp * sizeof(T));
      return;
    }
    for (int64_t o = 0; o < out; ++o) {
      for (int64_t j = 0; j < Dp; j += L::N) {
        T* drow = sums + job.drow_at + o * Dp + j;
        L::store(drow, L::load(drow) + dr[o] * L::load(q + j));
        L::store(dq + j, L::load(dq + j) + dr[o] * L::load(w + job.row_rows_at + o * Dp + j));
      }
      for (int64_t j = 0; !job.bilinear && j < Hp; j += L::N) {
        const int64_t at = o * Hp + j;
        const V g = L::load(s + job.dmatrix_at + at);
        L::store(sums + job.dstep_at + at, L::load(sums + job.dstep_at + at) + g);
        L::store(sums + job.dp_at + at, L::load(sums + job.dp_at + at) + g * L::load(q + j));
        L::store(dq + j, L::load(dq + j) + g * L::load(w + job.p_rows_at + at));
      }
    }
    if (job.bilinear) return;
    T* db = sums + job.mlp.layers[0].dbias_at;
    for (int64_t j = 0; j < width; j += L::N) L::store(db + j, L::load(db + j) + L::load(dr + j));
  }

  void reduce() const {
    if (job.mlp.count == 0) return;
    T* line = reinterpret_cast<T*>(job.room.scratch) + job.line_at;
    const Layer& first = job.mlp.layers[0];
    for (int64_t o = 0; o < out; ++o) {
      sum_groups(job.room, job.drow_at + o * Dp, job.size, line);
      if (!job.bilinear) {  // W_q + W_d, W_k - W_d, W_p
        T *step = line + job.hidden, *d = step + job.hidden;
        sum_groups(job.room, job.dstep_at + o * Hp, job.hidden, step);
        for (int64_t j = 0; j < job.hidden; ++j) d[j] = line[j] - step[j];
        sum_groups(job.room, job.dp_at + o * Hp, job.hidden, d + job.hidden);
      }
      write_row(first.dweight, job.mlp.gradients, o * first.in, first.in, line);
    }
    if (!job.bilinear) tail.reduce(job.room, line);
  }
};
