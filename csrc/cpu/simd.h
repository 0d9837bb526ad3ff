// Lanes: a vector of N values of T by the compiler's vector extension, and the two activations.
// Included inside an instruction set's namespace. Under AVX2, 16 floats become two registers by the compiler's
// own lowering, which is how the 16-lane kernels are executed on machines without AVX-512.

// The integer as wide as a value: shuffles take their indices so.
template <int Bytes>
struct IndexOf {
  using Type = int32_t;
};
template <>
struct IndexOf<8> {
  using Type = int64_t;
};

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
  // The vector with zeros in the lanes from `left` on: `left` values are to come, of which the vector holds the first.
  // Lanes past the last value are padding, and an infinity times the zero there is NaN: a sum over lanes leaves them out.
  static DIEN_INLINE V live(V v, int64_t left) {
    if (left >= N) return v;
    typedef typename IndexOf<sizeof(T)>::Type I __attribute__((vector_size(N_ * sizeof(T))));
    I lane;
    for (int i = 0; i < N; ++i) lane[i] = i;
    return lane < typename IndexOf<sizeof(T)>::Type(left) ? v : V{};
  }
};

// exp(f) - 1 = f + f^2 Q(f) for |f| <= ln 2 / 2; Q of degree 4 fitted to the least maximum of its relative error, 1.7e-8.
template <class V>
DIEN_INLINE V expm1_small(V f) {
  V q = 1.38825167e-3f - V{};
  q = q * f + 8.36654752e-3f;
  q = q * f + 4.16672006e-2f;
  q = q * f + 1.66665435e-1f;
  q = q * f + 4.99999970e-1f;
  return q * (f * f) + f;
}

constexpr float kLimit = 43.f;  // exp(43) < 2^63: two such factors still multiply below the largest float

// z clamped to [-kLimit, kLimit]; NaN fails both comparisons and passes.
template <class V>
DIEN_INLINE V clamp(V z) {
  const V hi = kLimit - V{}, lo = -kLimit - V{};
  z = z > hi ? hi : z;
  return z < lo ? lo : z;
}

// z = n ln 2 + f with n whole, for |z| <= kLimit: returns f, and 2^n in `scale`. ln 2 stands in two parts, the first of
// which has so few bits that n times it is exact.
template <class V>
DIEN_INLINE V split_exponent(V z, V& scale) {
  typedef int32_t I __attribute__((vector_size(sizeof(V))));
  const V shifted = z * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the low bits of the sum are n
  const V n = shifted - 12582912.f;
  scale = (V)(((I)shifted << 23) + 0x3f800000);
  return z - n * 0.693359375f + n * 2.12194440e-4f;
}

// 1 + exp(z): the denominator of a sigmoid.
template <class V>
DIEN_INLINE V one_plus_exp(V z) {
  V scale;
  const V f = split_exponent(clamp(z), scale);
  return expm1_small(f) * scale + (scale + 1.f);
}

// sigmoid: one; sigmoid2: two sigmoids for one division. A NaN in one lane reaches the same lane of the other: both enter the
// same state anyway.
template <class T, int N>
struct Activations;

template <int N>
struct Activations<float, N> {
  using V = typename Lanes<float, N>::V;
  static DIEN_INLINE V sigmoid(V x) { return 1.f / one_plus_exp(-x); }
  static DIEN_INLINE void sigmoid2(V& a, V& b) {
    const V da = one_plus_exp(-a), db = one_plus_exp(-b);
    const V inverse = 1.f / (da * db);
    a = db * inverse;
    b = da * inverse;
  }
  // -t / (2 + t) with t = exp(-2 |x|) - 1, which keeps its relative precision for small x.
  static DIEN_INLINE V tanh(V x) {
    typedef int32_t I __attribute__((vector_size(sizeof(V))));
    const I sign = (I)x & int32_t(0x80000000);
    const V z = (V)((I)x & 0x7fffffff) * -2.f;
    const V low = -kLimit - V{};
    V scale;
    const V f = split_exponent(z < low ? low : z, scale);
    const V t = expm1_small(f) * scale + (scale - 1.f);
    return (V)((I)(-t / (t + 2.f)) | sign);
  }
};

// double serves verification (gradcheck): the C library's exact functions, lane by lane.
template <int N>
struct Activations<double, N> {
  using V = typename Lanes<double, N>::V;
  static DIEN_INLINE V sigmoid(V x) {
    for (int i = 0; i < N; ++i) x[i] = 1 / (1 + __builtin_exp(-x[i]));
    return x;
  }
  static DIEN_INLINE void sigmoid2(V& a, V& b) { a = sigmoid(a), b = sigmoid(b); }
  static DIEN_INLINE V tanh(V x) {
    for (int i = 0; i < N; ++i) x[i] = __builtin_tanh(x[i]);
    return x;
  }
};

// The C library's functions of one value.
DIEN_INLINE float exponential(float x) { return __builtin_expf(x); }
DIEN_INLINE double exponential(double x) { return __builtin_exp(x); }
DIEN_INLINE float logarithm(float x) { return __builtin_logf(x); }
DIEN_INLINE double logarithm(double x) { return __builtin_log(x); }
DIEN_INLINE float logarithm_plus_one(float x) { return __builtin_log1pf(x); }
DIEN_INLINE double logarithm_plus_one(double x) { return __builtin_log1p(x); }
