// Working memory of an op in one piece, and huge pages for large results.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <span>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace dien {

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

// The bytes of `a` times `b` values with their padding, small enough that a few dozen such pieces can be added up.
inline void check_piece(int64_t a, int64_t b) {
  checked_product(checked_product(checked_product(a, 1) + 64, checked_product(b, 1) + 64), 1024);
}

// Whole cache lines.
inline int64_t rounded_bytes(int64_t n) { return (n + 63) / 64 * 64; }

using Memory = std::unique_ptr<char, decltype(&std::free)>;
using Piece = std::pair<char**, int64_t>;  // where its address goes, and its bytes

inline Memory allocate(std::span<const Piece> pieces) {
  int64_t total = 64;
  for (const auto& [piece, bytes] : pieces)
    if (__builtin_add_overflow(total, rounded_bytes(bytes), &total)) throw std::bad_alloc();
  Memory memory(static_cast<char*>(std::aligned_alloc(64, total)), &std::free);
  if (!memory) throw std::bad_alloc();
  char* at = memory.get();
  for (const auto& [piece, bytes] : pieces) {
    *piece = at;
    at += rounded_bytes(bytes);
  }
  return memory;
}

}  // namespace dien
