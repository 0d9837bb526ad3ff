// Rows of tensors of any storage dtype and stride: reading, writing, clearing, prefetching. Included inside an instruction
// set's namespace.

DIEN_INLINE float from_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float f;
  __builtin_memcpy(&f, &wide, 4);
  return f;
}

DIEN_INLINE uint16_t to_bf16(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16) | 0x40;  // NaN stays NaN
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);               // to nearest, ties to even
}

// Rows are short, and a call of the C library's memcpy costs as much as copying one.
template <class T>
DIEN_INLINE void copy_row(const T* in, int64_t n, T* out) {
  constexpr int64_t kWide = 32 / int64_t(sizeof(T));
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) __builtin_memcpy(out + i, in + i, 32);
  if (n - i >= kWide / 2) __builtin_memcpy(out + i, in + i, 16), i += kWide / 2;
#pragma GCC unroll 1
  for (; i < n; ++i) __builtin_memcpy(out + i, in + i, sizeof(T));
}

template <class T>
DIEN_INLINE void read_row(const Array& a, int64_t offset, int64_t stride, int64_t n, T* out) {
  if (a.store == Store::bf16) {
    const uint16_t* p = static_cast<const uint16_t*>(a.data) + offset;
    for (int64_t i = 0; i < n; ++i) out[i] = T(from_bf16(p[i * stride]));
  } else {
    const T* p = static_cast<const T*>(a.data) + offset;
    if (stride == 1)
      copy_row(p, n, out);
    else
      for (int64_t i = 0; i < n; ++i) out[i] = p[i * stride];
  }
}

template <class T>
DIEN_INLINE T read_one(const Array& a, int64_t offset) {
  T value;
  read_row(a, offset, 1, 1, &value);
  return value;
}

// `p` is contiguous storage of dtype `store`.
template <class T>
DIEN_INLINE void write_row(void* p, Store store, int64_t offset, int64_t n, const T* in) {
  if (store == Store::bf16) {
    uint16_t* q = static_cast<uint16_t*>(p) + offset;
    for (int64_t i = 0; i < n; ++i) q[i] = to_bf16(float(in[i]));
  } else {
    copy_row(in, n, static_cast<T*>(p) + offset);
  }
}

DIEN_INLINE int64_t size_of(Store store) { return store == Store::bf16 ? 2 : store == Store::f32 ? 4 : 8; }

// Asks for n values from `first` on, ahead of their use: into the second-level cache, as those of many rows overflow the
// first.
DIEN_INLINE void prefetch(const void* p, int64_t bytes_each, int64_t n, int64_t first = 0) {
  const char* at = static_cast<const char*>(p) + first * bytes_each;
  for (int64_t line = 0; line < n * bytes_each; line += 64) __builtin_prefetch(at + line, 0, 2);
}

DIEN_INLINE void zero_rows(void* p, Store store, int64_t row, int64_t count, int64_t width) {
  const int64_t bytes = width * size_of(store);
  if (count * bytes == 0) return;  // a tensor without elements has no address, and memset asks for one
  __builtin_memset(static_cast<char*>(p) + row * bytes, 0, count * bytes);
}

// A row, and zeros up to its padded size.
template <class L, class T = typename L::Scalar>
DIEN_INLINE void gather_padded(const Array& a, int64_t offset, int64_t stride, int64_t n, int64_t padded, T* out) {
  read_row(a, offset, stride, n, out);
  for (int64_t i = n; i < padded; ++i) out[i] = 0;
}

template <class T>
DIEN_NOINLINE void read_rows(const Array& w, int64_t rows, int64_t columns, T* out) {
  for (int64_t i = 0; i < rows; ++i) read_row(w, i * w.s0, w.s1, columns, out + i * columns);
}

template <class T>
DIEN_NOINLINE void read_vector(const Array& v, int64_t n, int64_t padded, T* out) {
  for (int64_t i = 0; i < padded; ++i) out[i] = i < n && v.data ? read_one<T>(v, i * v.s0) : T(0);
}
