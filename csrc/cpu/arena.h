// Hands out pieces of one buffer, each on cache lines of its own; with a null buffer it only counts their bytes.
// No include guard, as in cell.h: the plans include it, and each instruction set does inside its own namespace.
struct Arena {
  char* buffer;
  int64_t used = 0;

  // A place for `count` values, null without a buffer. Past any memory the count stands still, and nothing can be
  // allocated for it.
  template <class T>
  T* take(int64_t count) {
    constexpr int64_t kMost = INT64_MAX / 4 / 64 * 64;
    T* piece = buffer ? reinterpret_cast<T*>(buffer + used) : nullptr;
    int64_t bytes;
    if (__builtin_mul_overflow(count, int64_t(sizeof(T)), &bytes) || bytes > kMost - used)
      used = kMost;
    else
      used = round_up(used + bytes, 64);
    return piece;
  }
};
