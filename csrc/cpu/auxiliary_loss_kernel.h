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
  using Layers = Tail<L>;

  // Sizes: padded state and behaviour; the first layer's outputs, as they are and padded.
  struct Shape {
    int64_t Hp, Dp, out, width;
    explicit Shape(const AuxiliaryLossCall& call)
        : Hp(round_up(call.hidden, L::N)),
          Dp(round_up(call.size, L::N)),
          out(call.inner ? 0 : call.mlp.layers[0].out),
          width(round_up(out, L::N)) {}
  };
  static int64_t chunk_tokens(const AuxiliaryLossCall& call) { return call.chunk_pairs * (1 + call.negatives); }

  // W_h and W_e of (L2), packed for products with their transposes and, `backward`, with them; and the other layers.
  struct Packed {
    T *h_forward, *h_backward, *e_forward, *e_backward;
    T* plain;  // room for twice the largest matrix
    const typename Layers::Packed* layers;
    Packed(const AuxiliaryLossCall& call, const Shape& s, Arena& arena) {
      const int64_t derive = call.backward ? 1 : 0;
      layers = Layers::template take_layers<typename Layers::Packed>(call.mlp, arena, call.backward);
      h_forward = arena.take<T>(call.hidden * s.width);
      e_forward = arena.take<T>(call.size * s.width);
      h_backward = arena.take<T>(derive * s.out * s.Hp);
      e_backward = arena.take<T>(derive * s.out * s.Dp);
      plain = arena.take<T>(2 * Layers::largest(call.mlp));
    }
  };

  // A group's gradient sums (L8) of W_h [out][Hp], of W_e [out][Dp] and of the layers.
  struct Sums {
    T *h, *e;
    const typename Layers::Sums* layers;
    Sums(const AuxiliaryLossCall& call, const Shape& s, Arena& arena) {
      layers = Layers::template take_layers<typename Layers::Sums>(call.mlp, arena);
      h = arena.take<T>(s.out * s.Hp);
      e = arena.take<T>(s.out * s.Dp);
    }
  };

  // What a thread works in: a chunk of pairs. Behaviours, logits and layers hold the positives of all pairs, then their
  // first negatives, and so on. States and behaviours become their derivatives, and so do the logits.
  struct Scratch {
    T *h, *e, *r, *x, *d;
    T* line;  // a row of a matrix, while the groups are added up
    const typename Layers::Values* layers;
    Scratch(const AuxiliaryLossCall& call, const Shape& s, Arena& arena) {
      const int64_t tokens = chunk_tokens(call), derive = call.backward ? 1 : 0;
      layers = Layers::template take_layers<typename Layers::Values>(call.mlp, arena, tokens);
      h = arena.take<T>(call.chunk_pairs * s.Hp);
      e = arena.take<T>(tokens * s.Dp);
      r = arena.take<T>(call.chunk_pairs * s.width);
      x = arena.take<T>(tokens);
      d = arena.take<T>(derive * 2 * tokens * Layers::widest(call.mlp));
      line = arena.take<T>(derive * (s.Hp + s.Dp + Layers::widest(call.mlp)));
    }
  };

  const AuxiliaryLossCall& call;
  const Layers tail;
  const Shape s;
  const Packed w;

  static Sizes sizes(const AuxiliaryLossCall& call) {
    const Shape s(call);
    const int64_t sums = call.backward ? bytes_of<Sums>(call, s) : 0;
    return {bytes_of<Packed>(call, s), sums, bytes_of<Scratch>(call, s), 0};
  }

  static void run(const AuxiliaryLossCall& call) {
    Arena packed{call.workspace.packed};
    const AuxiliaryLoss kernel(call, packed);
    if (!call.inner) kernel.fill();
    run_tasks(call, call.workspace.groups, [&](char* scratch, int64_t g) { kernel.run_group(scratch, g); });
    if (call.backward && !call.inner) kernel.reduce();
  }

 private:
  AuxiliaryLoss(const AuxiliaryLossCall& c, Arena& packed) : call(c), tail{c.mlp}, s(c), w(c, s, packed) {}

  void fill() const {
    const Layer& first = call.mlp.layers[0];
    T *plain = w.plain, *transposed = plain + first.in * first.out;
    tail.fill(w.layers, plain, call.backward);
    read_rows(first.weight, first.out, first.in, plain);
    pack_matrix<L>(plain, first.in, first.out, call.hidden, transposed, w.h_forward,
                   call.backward ? w.h_backward : nullptr);
    pack_matrix<L>(plain + call.hidden, first.in, first.out, call.size, transposed, w.e_forward,
                   call.backward ? w.e_backward : nullptr);
  }

  void run_group(char* memory, int64_t g) const {
    Arena scratch{memory}, group_sums{call.backward ? sums_of(call.workspace, g) : nullptr};
    const Scratch c(call, s, scratch);
    if (call.backward) __builtin_memset(sums_of(call.workspace, g), 0, call.workspace.sizes.sums);
    const Sums sums(call, s, group_sums);
    const int64_t each = (call.count + call.workspace.groups - 1) / call.workspace.groups;
    const int64_t end = (g + 1) * each < call.count ? (g + 1) * each : call.count;
    double loss = 0;
    for (int64_t from = g * each; from < end; from += call.chunk_pairs)
      loss += run_chunk(call.pairs + from, end - from < call.chunk_pairs ? end - from : call.chunk_pairs, c, sums);
    call.losses[g] = loss;
  }

  double run_chunk(const Pair* pairs, int64_t n, const Scratch& c, const Sums& sums) const {
    gather(pairs, n, c);
    if (call.inner) {
      for (int64_t j = 0; j <= call.negatives; ++j)  // (L1)
        for (int64_t i = 0; i < n; ++i) c.x[j * n + i] = dot(c.h + i * s.Hp, c.e + (j * n + i) * s.Dp);
    } else {
      first_product(n, c);
      tail.forward(w.layers, c.layers, n * (1 + call.negatives), c.x);
    }
    const double loss = terms(pairs, n, c.x);
    if (!call.backward) return loss;
    if (call.inner)
      inner_backward(n, c);
    else
      mlp_backward(n, c, sums);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t state = dense(pairs[i]), behaviour = state + call.ahead;
      write(call.dstates, state, call.hidden, c.h + i * s.Hp);
      write(call.dpositive, behaviour, call.size, c.e + i * s.Dp);
      for (int64_t j = 0; j < call.negatives; ++j)
        write(call.dnegative, behaviour * call.negatives + j, call.size, c.e + ((1 + j) * n + i) * s.Dp);
    }
    return loss;
  }

  int64_t dense(const Pair& p) const { return p.row * call.dense_row + p.step; }
  static DIEN_INLINE void write(void* out, int64_t row, int64_t n, const T* in) {
    copy_row(in, n, static_cast<T*>(out) + row * n);
  }

  void gather(const Pair* pairs, int64_t n, const Scratch& c) const {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = pairs[i].row, step = pairs[i].step, next = step + call.ahead;
      gather_padded<L>(call.states, row * call.states.s0 + step * call.states.s1, call.states.s2, call.hidden, s.Hp,
                       c.h + i * s.Hp);
      gather_padded<L>(call.positive, row * call.positive.s0 + next * call.positive.s1, call.positive.s2, call.size,
                       s.Dp, c.e + i * s.Dp);
      const int64_t negative = row * call.negative.s0 + next * call.negative.s1;
      for (int64_t j = 0; j < call.negatives; ++j)
        gather_padded<L>(call.negative, negative + j * call.negative_each, call.negative.s2, call.size, s.Dp,
                         c.e + ((1 + j) * n + i) * s.Dp);
    }
  }

  DIEN_INLINE T dot(const T* a, const T* b) const {
    V sum{};
    for (int64_t j = 0; j < s.Hp; j += L::N) sum += L::load(a + j) * L::load(b + j);
    return L::sum(sum);
  }

  // (L2): z_1 of every behaviour.
  void first_product(int64_t n, const Scratch& c) const {
    T* z = c.layers[0].z;
    affine<L>(c.h, s.Hp, w.h_forward, call.hidden, w.layers[0].bias, 0, s.width / L::N, n, c.r, s.width);
    for (int64_t j = 0; j <= call.negatives; ++j)
      affine<L>(c.e + j * n * s.Dp, s.Dp, w.e_forward, call.size, c.r, s.width, s.width / L::N, n, z + j * n * s.width,
                s.width);
  }

  // (L3), (L4) of a chunk; the logits become their derivatives, (L6).
  double terms(const Pair* pairs, int64_t n, T* x) const {
    double loss = 0;
    for (int64_t j = 0; j <= call.negatives; ++j) {
      const T sign = j == 0 ? T(1) : T(-1);
      const double* weight = j == 0 ? call.positive_weight : call.negative_weight;
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
    if (call.eps > 0) {
      slope = -s * away / (s + T(call.eps));
      return -logarithm(s + T(call.eps));
    }
    const T exact = logarithm_plus_one(e) - (z < 0 ? z : T(0));
    const bool clamped = call.eps < 0 && exact >= 100;
    slope = clamped ? T(0) : -away;
    return clamped ? T(100) : exact;
  }

  // (L7): e becomes x h, and h the sum of x e.
  void inner_backward(int64_t n, const Scratch& c) const {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < s.Hp; j += L::N) {
        const V state = L::load(c.h + i * s.Hp + j);
        V sum{};
        for (int64_t k = 0; k <= call.negatives; ++k) {
          T* behaviour = c.e + (k * n + i) * s.Dp + j;
          sum += c.x[k * n + i] * L::load(behaviour);
          L::store(behaviour, c.x[k * n + i] * state);
        }
        L::store(c.h + i * s.Hp + j, sum);
      }
  }

  // (L8): behaviours and states become their derivatives.
  void mlp_backward(int64_t n, const Scratch& c, const Sums& sums) const {
    const int64_t tokens = n * (1 + call.negatives), width = s.width;
    T* dz = tail.backward(w.layers, c.layers, tokens, c.x, c.d, sums.layers);
    product_transposed<L>(dz, width, c.e, s.Dp, tokens, s.out, s.Dp / L::N, sums.e, s.Dp);
    product<L, false>(dz, width, 1, 0, w.e_backward, s.out, s.Dp / L::N, tokens, c.e, s.Dp);
    for (int64_t j = 1; j <= call.negatives; ++j)  // dz of the positives becomes the derivative by r
      for (int64_t i = 0; i < n * width; i += L::N) L::store(dz + i, L::load(dz + i) + L::load(dz + j * n * width + i));
    product_transposed<L>(dz, width, c.h, s.Hp, n, s.out, s.Hp / L::N, sums.h, s.Hp);
    add_column_sums<L>(dz, width, n, width, sums.layers[0].bias);
    product<L, false>(dz, width, 1, 0, w.h_backward, s.out, s.Hp / L::N, n, c.h, s.Hp);
  }

  void reduce() const {
    Arena scratch{call.workspace.scratch}, first_sums{sums_of(call.workspace, 0)};
    T* line = Scratch(call, s, scratch).line;
    const Sums sums(call, s, first_sums);
    const Layer& first = call.mlp.layers[0];
    for (int64_t o = 0; o < first.out; ++o) {
      sum_groups(call.workspace, sums.h + o * s.Hp, call.hidden, line);
      sum_groups(call.workspace, sums.e + o * s.Dp, call.size, line + call.hidden);
      write_row(first.dweight, call.mlp.gradients, o * first.in, first.in, line);
    }
    tail.reduce(call.workspace, sums.layers, line);
  }
};
