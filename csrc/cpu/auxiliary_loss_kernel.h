// The auxiliary loss, equations (L1) to (L8) of docs/math-auxiliary-loss.md: loss and gradients in one pass. Included inside
// an instruction set's namespace.
//
// A chunk of pairs at a time: states and behaviours are gathered, first the positives, then negative after negative, so
// that the states' half of the first layer serves all of them; logits, their derivatives and the way back follow while
// everything is in the second-level cache.

template <class L>
struct AuxiliaryLoss {
  using T = typename L::Scalar;
  using V = typename L::V;

  const AuxiliaryJob& job;
  const Tail<L> tail;
  const int64_t Hp, Dp, width;  // padded state, behaviour and first layer

  explicit AuxiliaryLoss(const AuxiliaryJob& j)
      : job(j),
        tail{j.mlp},
        Hp(round_up(j.hidden, L::N)),
        Dp(round_up(j.size, L::N)),
        width(j.inner ? 0 : j.mlp.layers[0].out_padded) {}

  static void lay_out(AuxiliaryJob& job) {
    Room& room = job.room;
    const int64_t tokens = job.chunk_pairs * (1 + job.negatives);
    Tail<L>::lay_out(job.mlp, tokens, job.backward, room);
    const AuxiliaryLoss k(job);
    const int64_t out = job.inner ? 0 : job.mlp.layers[0].out, back = job.backward ? 1 : 0;
    job.h_forward_at = take<T>(room.packed_bytes, job.hidden * k.width);
    job.e_forward_at = take<T>(room.packed_bytes, job.size * k.width);
    job.h_backward_at = take<T>(room.packed_bytes, back * out * k.Hp);
    job.e_backward_at = take<T>(room.packed_bytes, back * out * k.Dp);
    job.plain_at = take<T>(room.packed_bytes, 2 * Tail<L>::largest(job.mlp));
    job.dh_at = take<T>(room.partial_bytes, back * out * k.Hp);
    job.de_at = take<T>(room.partial_bytes, back * out * k.Dp);
    job.states_at = take<T>(room.scratch_bytes, job.chunk_pairs * k.Hp);
    job.behaviours_at = take<T>(room.scratch_bytes, tokens * k.Dp);
    job.r_at = take<T>(room.scratch_bytes, job.chunk_pairs * k.width);
    job.x_at = take<T>(room.scratch_bytes, tokens);
    job.d_at = take<T>(room.scratch_bytes, back * 2 * tokens * Tail<L>::widest(job.mlp));
  }

  static void run(const AuxiliaryJob& job) {
    const AuxiliaryLoss k(job);
    if (!job.inner) k.fill();
    run_tasks(job.threads, job.room.scratch, job.room.scratch_bytes, job.room.groups,
              [&](char* scratch, int64_t g) { k.run_group(reinterpret_cast<T*>(scratch), g); });
    if (job.backward && !job.inner) k.reduce();
  }

 private:
  T* packed() const { return reinterpret_cast<T*>(job.room.packed); }

  void fill() const {
    const Layer& first = job.mlp.layers[0];
    T *plain = packed() + job.plain_at, *transposed = plain + first.in * first.out;
    tail.fill(packed(), plain, job.backward);
    read_rows(first.weight, first.out, first.in, plain);
    pack_matrix<L>(plain, first.in, first.out, job.hidden, transposed, packed() + job.h_forward_at,
                   job.backward ? packed() + job.h_backward_at : nullptr);
    pack_matrix<L>(plain + job.hidden, first.in, first.out, job.size, transposed, packed() + job.e_forward_at,
                   job.backward ? packed() + job.e_backward_at : nullptr);
  }

  void run_group(T* scratch, int64_t g) const {
    T* sums = reinterpret_cast<T*>(job.room.partial + g * job.room.partial_bytes);
    __builtin_memset(sums, 0, job.room.partial_bytes);
    const int64_t each = (job.count + job.room.groups - 1) / job.room.groups;
    const int64_t end = (g + 1) * each < job.count ? (g + 1) * each : job.count;
    double loss = 0;
    for (int64_t from = g * each; from < end; from += job.chunk_pairs)
      loss += run_chunk(scratch, sums, job.pairs + from, end - from < job.chunk_pairs ? end - from : job.chunk_pairs);
    job.losses[g] = loss;
  }

  double run_chunk(T* scratch, T* sums, const Pair* pairs, int64_t n) const {
    T *h = scratch + job.states_at, *e = scratch + job.behaviours_at, *x = scratch + job.x_at;
    gather(pairs, n, h, e);
    if (job.inner) {
      for (int64_t j = 0; j <= job.negatives; ++j)
        for (int64_t i = 0; i < n; ++i) x[j * n + i] = dot(h + i * Hp, e + (j * n + i) * Dp);
    } else {
      first_product(scratch, n);
      tail.forward(packed(), scratch, n * (1 + job.negatives), x);
    }
    const double loss = terms(pairs, n, x);
    if (!job.backward) return loss;
    if (job.inner)
      inner_backward(n, x, h, e);
    else
      mlp_backward(scratch, sums, n);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t state = dense(pairs[i]), behaviour = state + job.ahead;
      write(job.dstates, state, job.hidden, h + i * Hp);
      write(job.dpositive, behaviour, job.size, e + i * Dp);
      for (int64_t j = 0; j < job.negatives; ++j)
        write(job.dnegative, behaviour * job.negatives + j, job.size, e + ((1 + j) * n + i) * Dp);
    }
    return loss;
  }

  int64_t dense(const Pair& p) const { return p.row * job.dense_row + p.step; }
  static DIEN_INLINE void write(void* out, int64_t row, int64_t n, const T* in) {
    copy_row(in, n, static_cast<T*>(out) + row * n);
  }

  void gather(const Pair* pairs, int64_t n, T* h, T* e) const {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = pairs[i].row, step = pairs[i].step, next = step + job.ahead;
      gather_padded<L>(job.states, row * job.states.s0 + step * job.states.s1, job.states.s2, job.hidden, Hp,
                       h + i * Hp);
      gather_padded<L>(job.positive, row * job.positive.s0 + next * job.positive.s1, job.positive.s2, job.size, Dp,
                       e + i * Dp);
      const int64_t negative = row * job.negative.s0 + next * job.negative.s1;
      for (int64_t j = 0; j < job.negatives; ++j)
        gather_padded<L>(job.negative, negative + j * job.negative_each, job.negative.s2, job.size, Dp,
                         e + ((1 + j) * n + i) * Dp);
    }
  }

  DIEN_INLINE T dot(const T* a, const T* b) const {
    V sum{};
    for (int64_t j = 0; j < Hp; j += L::N) sum += L::load(a + j) * L::load(b + j);
    return L::sum(sum);
  }

  // (L2): z_1 of every behaviour.
  void first_product(T* scratch, int64_t n) const {
    const Layer& first = job.mlp.layers[0];
    T *r = scratch + job.r_at, *z = scratch + first.z_at;
    affine<L>(scratch + job.states_at, Hp, packed() + job.h_forward_at, job.hidden, packed() + first.bias_at, 0,
              width / L::N, n, r, width);
    for (int64_t j = 0; j <= job.negatives; ++j)
      affine<L>(scratch + job.behaviours_at + j * n * Dp, Dp, packed() + job.e_forward_at, job.size, r, width,
                width / L::N, n, z + j * n * width, width);
  }

  // (L3), (L4) of a chunk; the logits become their derivatives, (L6).
  double terms(const Pair* pairs, int64_t n, T* x) const {
    double loss = 0;
    for (int64_t j = 0; j <= job.negatives; ++j) {
      const T sign = j == 0 ? T(1) : T(-1);
      const double* weight = j == 0 ? job.positive_weight : job.negative_weight;
      for (int64_t i = 0; i < n; ++i) {
        const T w = T(weight[pairs[i].of]);
        T slope;
        loss += double(w * term(sign * x[j * n + i], slope));
        x[j * n + i] = sign * w * slope;
      }
    }
    return loss;
  }

  // f(z) and f'(z): equations (L3), (L6). `away` is 1 - sigmoid(z) without its rounding.
  DIEN_INLINE T term(T z, T& slope) const {
    const T e = exponential(z < 0 ? z : -z), inverse = 1 / (1 + e);
    const T s = z < 0 ? e * inverse : inverse, away = z < 0 ? inverse : e * inverse;
    if (job.eps > 0) {
      slope = -s * away / (s + T(job.eps));
      return -logarithm(s + T(job.eps));
    }
    const T exact = logarithm_plus_one(e) - (z < 0 ? z : T(0));
    const bool clamped = job.eps < 0 && exact >= 100;
    slope = clamped ? T(0) : -away;
    return clamped ? T(100) : exact;
  }

  // (L7): e becomes x h, and h the sum of x e.
  void inner_backward(int64_t n, const T* x, T* h, T* e) const {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < Hp; j += L::N) {
        const V state = L::load(h + i * Hp + j);
        V sum{};
        for (int64_t k = 0; k <= job.negatives; ++k) {
          T* behaviour = e + (k * n + i) * Dp + j;
          sum += x[k * n + i] * L::load(behaviour);
          L::store(behaviour, x[k * n + i] * state);
        }
        L::store(h + i * Hp + j, sum);
      }
  }

  // (L8): behaviours and states become their derivatives.
  void mlp_backward(T* scratch, T* sums, int64_t n) const {
    const Layer& first = job.mlp.layers[0];
    const int64_t tokens = n * (1 + job.negatives);
    T *h = scratch + job.states_at, *e = scratch + job.behaviours_at;
    T* dz = tail.backward(packed(), scratch, tokens, scratch + job.x_at, scratch + job.d_at, sums);
    product_transposed<L>(dz, width, e, Dp, tokens, first.out, Dp / L::N, sums + job.de_at, Dp);
    product<L, false>(dz, width, 1, 0, packed() + job.e_backward_at, first.out, Dp / L::N, tokens, e, Dp);
    for (int64_t j = 1; j <= job.negatives; ++j)
      for (int64_t i = 0; i < n * width; i += L::N) L::store(dz + i, L::load(dz + i) + L::load(dz + j * n * width + i));
    product_transposed<L>(dz, width, h, Hp, n, first.out, Hp / L::N, sums + job.dh_at, Hp);
    add_column_sums<L>(dz, width, n, width, sums + first.dbias_at);
    product<L, false>(dz, width, 1, 0, packed() + job.h_backward_at, first.out, Hp / L::N, n, h, Hp);
  }

  void reduce() const {
    T* row = reinterpret_cast<T*>(job.room.scratch);
    const Layer& first = job.mlp.layers[0];
    for (int64_t o = 0; o < first.out; ++o) {
      sum_groups(job.room, job.dh_at + o * Hp, job.hidden, row);
      sum_groups(job.room, job.de_at + o * Dp, job.size, row + job.hidden);
      write_row(first.dweight, job.mlp.gradients, o * first.in, first.in, row);
    }
    tail.reduce(job.room, row);
  }
};
