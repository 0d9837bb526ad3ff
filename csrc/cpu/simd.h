// Lanes: a vector of N values of T by the compiler's vector extension, and the two activations.
// Included inside an instruction set's namespace. Under AVX2, 16 floats become two registers by the compiler's
// own lowering, which is how the 16-lane kernels are executed on machines without AVX-512.

template <class T, int N_>
struct Lanes {
  using Scalar = T;
  static constexpr int N = N_;
  typedef T V __attribute__((vector_size(N_ * sizeof(T))));
  static DIEN_INLINE V load(const T* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static DIEN_INLINE void store(T* p, V v) { __builtin_memcpy(p, &v, sizeof v); }
  static DIEN_INLINE V splat(T s) { return s - V{}; }
  static DIEN_INLINE T sum(V v) {
    T s = 0;
    for (int i = 0; i < N; ++i) s += v[i];
    return s;
  }
};

// 2^y - 1 for |y| <= 0.5 is y P(y); P of degree 5 fitted to the least maximum of its relative error, 1.1e-8.
template <class V>
DIEN_INLINE V exp2_minus_one_small(V y) {
  V p = 1.54035089e-4f - V{};
  p = p * y + 1.33907358e-3f;
  p = p * y + 9.61823751e-3f;
  p = p * y + 5.55035743e-2f;
  p = p * y + 2.40226498e-1f;
  p = p * y + 6.93147188e-1f;
  return p * y;
}

// y clamped to [-limit, limit]; NaN fails both comparisons and passes.
template <class V>
DIEN_INLINE V clamp(V y, float limit) {
  const V hi = limit - V{}, lo = -limit - V{};
  y = y > hi ? hi : y;
  return y < lo ? lo : y;
}

// y = n + f with n whole: returns f, and 2^n in `scale`. Needs |y| < 2^21.
template <class V>
DIEN_INLINE V split_exponent(V y, V& scale) {
  typedef int32_t I __attribute__((vector_size(sizeof(V))));
  const V shifted = y + 12582912.f;  // 1.5 * 2^23: the low bits of the sum are round(y)
  const V whole = shifted - 12582912.f;
  scale = (V)(((I)shifted << 23) + 0x3f800000);
  return y - whole;
}

constexpr float kLog2e = 1.44269504f;
constexpr float kLimit = 62.f;  // 2^62: two such factors still multiply below the largest float

// 1 + 2^y: the denominator of a sigmoid.
template <class V>
DIEN_INLINE V one_plus_exp2(V y) {
  V scale;
  const V f = split_exponent(clamp(y, kLimit), scale);
  return (exp2_minus_one_small(f) + 1.f) * scale + 1.f;
}

// sigmoid2: two sigmoids for one division. A NaN in one lane reaches the same lane of the other: both enter the
// same state anyway.
template <class T, int N>
struct Activations;

template <int N>
struct Activations<float, N> {
  using V = typename Lanes<float, N>::V;
  static DIEN_INLINE void sigmoid2(V& a, V& b) {
    const V da = one_plus_exp2(a * -kLog2e), db = one_plus_exp2(b * -kLog2e);
    const V inverse = 1.f / (da * db);
    a = db * inverse;
    b = da * inverse;
  }
  // -t / (2 + t) with t = 2^(-2 |x| log2 e) - 1, which keeps its relative precision for small x.
  static DIEN_INLINE V tanh(V x) {
    typedef int32_t I __attribute__((vector_size(sizeof(V))));
    const I sign = (I)x & int32_t(0x80000000);
    const V y = (V)((I)x & 0x7fffffff) * (-2.f * kLog2e);
    const V low = -kLimit - V{};
    V scale;
    const V f = split_exponent(y < low ? low : y, scale);
    const V t = exp2_minus_one_small(f) * scale + (scale - 1.f);
    return (V)((I)(-t / (t + 2.f)) | sign);
  }
};

// double serves verification (gradcheck): the C library's exact functions, lane by lane.
template <int N>
struct Activations<double, N> {
  using V = typename Lanes<double, N>::V;
  static DIEN_INLINE void sigmoid2(V& a, V& b) {
    for (int i = 0; i < N; ++i) a[i] = 1 / (1 + __builtin_exp(-a[i]));
    for (int i = 0; i < N; ++i) b[i] = 1 / (1 + __builtin_exp(-b[i]));
  }
  static DIEN_INLINE V tanh(V x) {
    for (int i = 0; i < N; ++i) x[i] = __builtin_tanh(x[i]);
    return x;
  }
};
