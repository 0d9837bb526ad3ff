// Large results on huge pages, where the system offers them on request: a fresh 4 KiB page costs as much to fault in
// as the kernels take to fill it.
#pragma once
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace dien {

inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = 2 << 20;
  if (bytes < int64_t(4 * kPage)) return;
  const uintptr_t from = (uintptr_t(data) + kPage - 1) / kPage * kPage, to = (uintptr_t(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // advice: a refusal costs speed alone
#endif
}

}  // namespace dien
