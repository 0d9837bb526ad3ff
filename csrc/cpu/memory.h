// The working memory of a call, and huge pages for large results.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "params.h"

namespace dien {

#include "arena.h"

// Large results on huge pages, where the system offers them on request: a fresh 4 KiB page costs as much to fault in
// as the kernels take to fill it.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = 2 << 20;
  if (bytes < int64_t(4 * kPage)) return;
  const uintptr_t from = (uintptr_t(data) + kPage - 1) / kPage * kPage, to = (uintptr_t(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // advice: a refusal costs speed alone
#endif
}

// A size in bytes or rows. Strides may be zero, so that a tensor can have more rows than any memory.
inline int64_t checked_product(int64_t a, int64_t b) {
  int64_t result;
  if (__builtin_mul_overflow(a, b, &result) || result > INT64_MAX / 4) throw std::bad_alloc();
  return result;
}

// Throws std::bad_alloc unless `a` times `b` values and their padding are so few that the sizes of a few dozen such
// arrays can be added up.
inline void check_size(int64_t a, int64_t b) {
  checked_product(checked_product(checked_product(a, 1) + 64, checked_product(b, 1) + 64), 1024);
}

using Memory = std::unique_ptr<char, decltype(&std::free)>;

// The working memory of a call, in one piece: sets the addresses in `w`. Throws std::bad_alloc.
inline Memory allocate(Workspace& w, int64_t threads) {
  const auto lay_out = [&](char* buffer) {
    Arena arena{buffer};
    w.packed = arena.take<char>(w.sizes.packed);
    w.sums = arena.take<char>(checked_product(w.groups, w.sizes.sums));
    w.projection = arena.take<char>(checked_product(w.projection_rows, w.sizes.projection_row));
    w.shared_gradient = arena.take<char>(checked_product(w.gradient_rows, w.sizes.projection_row));
    w.scratch = arena.take<char>(checked_product(threads, w.sizes.scratch));
    return arena.used;
  };
  Memory memory(static_cast<char*>(std::aligned_alloc(64, lay_out(nullptr) + 64)), &std::free);
  if (!memory) throw std::bad_alloc();
  lay_out(memory.get());
  return memory;
}

}  // namespace dien
