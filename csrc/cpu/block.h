// What forward and backward share: packed weights, a block of rows in lockstep, its chunks of time, gathers and scatters.
// Included inside an instruction set's namespace.
//
// A block is up to `block_rows` rows, longest first, so that the rows alive at step s are a prefix `active(s)`. A chunk is a
// run of steps whose (row, step) pairs, the tokens, fit the second-level cache; token numbers are dense: step s of row i
// is token `base(s) + i`. Scratch arrays hold one token a row, units padded to whole vectors.

template <class L>
struct Shape {
  using T = typename L::Scalar;
  int64_t I, H, Ip, Hp, G;  // sizes, padded sizes, stride of a token's gates in scratch
  int64_t Hk;               // units of a kept gate, the same for every instruction set

  explicit Shape(const RecurrenceCall& call)
      : I(call.input),
        H(call.hidden),
        Ip(round_up(I, L::N)),
        Hp(round_up(H, L::N)),
        G(token_stride(4 * Hp)),
        Hk(round_up(H, kKeptUnits)) {}

  // An odd number of cache lines: tokens at a power-of-two stride would share a few cache sets.
  static int64_t token_stride(int64_t n) {
    const int64_t line = 64 / int64_t(sizeof(T)), lines = round_up(n, line) / line;
    return (lines | 1) * line;
  }
  int64_t units() const { return Hp / L::N; }
};

// Whether W_ih x of shared histories is wanted: by the forward, to recompute gates, and for (22).
inline bool projects(const RecurrenceCall& call) {
  return call.shared && (!call.backward || !call.gates || call.scale_input);
}

// Weights in the compute dtype, update gate on the candidate side, in every order the loops read them.
template <class L>
struct Weights {
  using T = typename L::Scalar;
  T *bias_x, *bias_n;  // [3][Hp] added to the projection; [Hp] added to W_hn h
  T *ih, *hh, *hh_n;   // by gates: W_ih [3]; W_hh [3], or [2] and n alone where the reset comes first
  T *columns_ih, *columns_hh, *columns_hn;  // for the backward
  T* plain;                                 // [3 H][max(I, H)]: room for a copy in the compute dtype

  Weights(const RecurrenceCall& call, const Shape<L>& s, Arena& arena) {
    const bool before = call.reset_before, backward = call.backward;
    const int64_t wanted = call.unpacked ? 0 : 1;
    bias_x = arena.take<T>(3 * s.Hp);
    bias_n = arena.take<T>(s.Hp);
    ih = arena.take<T>(wanted * s.I * 3 * s.Hp);
    hh = arena.take<T>(wanted * s.H * 3 * s.Hp);
    hh_n = before ? hh + s.H * 2 * s.Hp : nullptr;
    columns_ih = arena.take<T>(backward ? 3 * s.H * s.Ip : 0);
    columns_hh = arena.take<T>(backward ? 3 * s.H * s.Hp : 0);
    columns_hn = before ? columns_hh + 2 * s.H * s.Hp : nullptr;
    plain = arena.take<T>(wanted * 3 * s.H * (s.I > s.H ? s.I : s.H));
  }

  void fill(const RecurrenceCall& call, const Shape<L>& s) const {
    const bool before = call.reset_before, backward = call.backward;
    read_biases(call, s);
    if (call.unpacked) return;
    static constexpr int n_r_u[3] = {2, 0, 1}, r_u_n[3] = {0, 1, 2}, n_only[1] = {2};
    Matrix<T> m = read_matrix(call.w_ih, s.H, s.I, call.keep_side, plain);
    const bool gates = !(backward && call.gates);
    if (gates || projects(call)) pack_gates<L>(m, 0, 3, ih);
    if (backward) pack_columns<L>(m, n_r_u, 3, columns_ih);
    m = read_matrix(call.w_hh, s.H, s.H, call.keep_side, plain);
    if (gates) {
      pack_gates<L>(m, 0, before ? 2 : 3, hh);
      if (before) pack_gates<L>(m, 2, 1, hh_n);
    }
    if (backward) pack_columns<L>(m, r_u_n, before ? 2 : 3, columns_hh);
    if (backward && before) pack_columns<L>(m, n_only, 1, columns_hn);
  }

 private:
  // b_hh joins b_ih except for n after the product, where it stays inside r's reach.
  void read_biases(const RecurrenceCall& call, const Shape<L>& s) const {
    for (int64_t i = 0; i < 3 * s.Hp; ++i) bias_x[i] = 0;
    for (int64_t i = 0; i < s.Hp; ++i) bias_n[i] = 0;
    for (int64_t gate = 0; gate < 3; ++gate)
      for (int64_t i = 0; i < s.H; ++i) {
        const int64_t at = gate * s.H + i;
        T x = call.b_ih.data ? read_one<T>(call.b_ih, at * call.b_ih.s0) : T(0);
        const T h = call.b_hh.data ? read_one<T>(call.b_hh, at * call.b_hh.s0) : T(0);
        const bool apart = gate == 2 && !call.reset_before;
        if (apart)
          bias_n[i] = h;
        else
          x += h;
        bias_x[gate * s.Hp + i] = gate == 1 && call.keep_side ? -x : x;
      }
  }
};

// A block's rows and the chunk of time being worked on.
struct Chunk {
  int64_t first, last;  // steps [first, last)
  int64_t tokens;
};

struct Block {
  const RecurrenceCall& call;
  const Row* rows;
  int64_t count;

  Block(const RecurrenceCall& c, int64_t index)
      : call(c),
        rows(c.rows + index * c.block_rows),
        count(c.batch - index * c.block_rows < c.block_rows ? c.batch - index * c.block_rows : c.block_rows) {}

  int64_t longest() const { return count ? rows[0].length : 0; }

  // How many rows are alive at step s, given how many were at an earlier one.
  int64_t active(int64_t s, int64_t at_most) const {
    while (at_most > 0 && rows[at_most - 1].length <= s) --at_most;
    return at_most;
  }

  // The chunk that begins at step s.
  Chunk chunk_from(int64_t s) const {
    Chunk c{s, s, 0};
    int64_t alive = active(s, count);
    while (alive > 0 && (c.last == s || c.tokens + alive <= call.chunk_tokens)) {
      c.tokens += alive;
      ++c.last;
      alive = active(c.last, alive);
    }
    return c;
  }

  // f(step, alive rows, first token) for each step of a chunk, in order.
  template <class F>
  DIEN_INLINE void for_steps(const Chunk& c, F&& f) const {
    int64_t alive = count, base = 0;
    for (int64_t s = c.first; s < c.last; ++s) {
      alive = active(s, alive);
      f(s, alive, base);
      base += alive;
    }
  }

  // f(row, step, token) for each token of a chunk.
  template <class F>
  DIEN_INLINE void for_tokens(const Chunk& c, F&& f) const {
    for_steps(c, [&](int64_t s, int64_t alive, int64_t base) {
      for (int64_t i = 0; i < alive; ++i) f(rows[i], i, s, base + i);
    });
  }
};

inline int64_t block_count(const RecurrenceCall& call) { return (call.batch + call.block_rows - 1) / call.block_rows; }

// alpha, beta, gamma of a token: equation (9).
template <class T>
struct Scalars {
  T a, alpha, beta, gamma;
  Scalars() = default;
  DIEN_INLINE Scalars(const RecurrenceCall& call, const Row& row, int64_t s)
      : a(call.attention.data ? read_one<T>(call.attention, row.attention + s * call.attention_step) : T(0)),
        alpha(T(call.alpha0) + T(call.alpha1) * a),
        beta(T(call.beta0) + T(call.beta1) * a),
        gamma(call.scale_input ? a : T(1)) {}
};

// Where the kept gates [r | u | n | hn] of a step stand: [kept row][4][Hk] in the compute dtype.
template <class T>
DIEN_INLINE T* kept_gates(const RecurrenceCall& call, int64_t units, const Row& row, int64_t step) {
  return static_cast<T*>(call.gates) + (row.kept + step) * 4 * units;
}

// A vector of a kept gate with `left` units from here on: all of it, or the first half, whose other lanes are zero.
template <class L, class T = typename L::Scalar>
DIEN_INLINE typename L::V load_kept(const T* p, int64_t left) {
  static_assert(L::N <= 2 * kKeptUnits);
  if constexpr (L::N > kKeptUnits)
    if (left < L::N) {
      typename L::V v{};
      __builtin_memcpy(&v, p, kKeptUnits * sizeof(T));
      return v;
    }
  return L::load(p);
}

template <class L, class T = typename L::Scalar>
DIEN_INLINE void store_kept(T* p, int64_t left, typename L::V v) {
  if constexpr (L::N > kKeptUnits)
    if (left < L::N) {
      __builtin_memcpy(p, &v, kKeptUnits * sizeof(T));
      return;
    }
  L::store(p, v);
}

// Whether any row reads a shared history. What no row reads must not enter a product: there may be NaN in it.
inline bool is_read(const RecurrenceCall& call, int64_t u) {
  return call.first_of_history[u] < call.first_of_history[u + 1];
}

// Shared histories: W_ih x of every step of one history, once for all its rows, without bias: [history step][3][Hp].
template <class L, class T = typename L::Scalar>
void project_history(const RecurrenceCall& call, const Shape<L>& s, const Weights<L>& w, const Row& row, T* xs,
                     T* projection) {
  for (int64_t from = 0; from < row.length; from += call.chunk_tokens) {
    const int64_t n = row.length - from < call.chunk_tokens ? row.length - from : call.chunk_tokens;
    for (int64_t t = 0; t < n; ++t)
      gather_padded<L>(call.x, row.x + (from + t) * call.x_step, call.x.s2, s.I, s.Ip, xs + t * s.Ip);
    for (int64_t block = 0; block < s.units(); ++block)
      for_row_tiles(n, [&]<int M>(int64_t i) {
        typename L::V acc[M][3] = {};
        multiply<L>(xs + i * s.Ip, s.Ip, w.ih + block * s.I * 3 * L::N, s.I, acc);
        store_gates<L>(projection + (row.dx + (from + i) * call.dx_step) * 3 * s.Hp + block * L::N,
                       call.dx_step * 3 * s.Hp, s.Hp, acc);
      });
  }
}

// Zeros past a row's length in a contiguous padded array of `rows` rows; jagged arrays have no such place.
DIEN_INLINE void zero_padding(const RecurrenceCall& call, void* p, int64_t row, int64_t length, int64_t rows,
                              int64_t width) {
  if (call.jagged) return;
  if (call.time_major)
    for (int64_t t = length; t < call.steps; ++t) zero_rows(p, call.x.store, t * rows + row, 1, width);
  else
    zero_rows(p, call.x.store, row * call.steps + length, call.steps - length, width);
}
