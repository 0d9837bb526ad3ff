// How the rows of a batch lie in memory: what every op on histories is told, and the checks of its values.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace dien {

// On top of the arrays of a call; contiguous int64, null where absent.
struct Layout {
  const int64_t *lengths, *offsets, *history;
  int64_t x_rows;          // N of a jagged batch
  int64_t attention_rows;  // steps of all rows, where attention is jagged; else -1
  bool reverse;
};

[[noreturn]] inline void reject(const std::string& message) { throw std::invalid_argument(message); }

// Throws std::invalid_argument, naming the argument, for values that would leave the arrays.
void check_layout(const Layout& layout, int64_t histories, int64_t steps, int64_t batch);

// Steps of history u, of `steps` padded ones.
inline int64_t history_length(const Layout& layout, int64_t u, int64_t steps) {
  if (layout.offsets) return layout.offsets[u + 1] - layout.offsets[u];
  return layout.lengths ? layout.lengths[u] : steps;
}

// The rows of each history, in order: those of history u are rows[first[u]] .. rows[first[u + 1] - 1].
struct RowsOfHistories {
  std::vector<int64_t> rows, first;

  RowsOfHistories() = default;
  template <class HistoryOf>
  RowsOfHistories(int64_t histories, int64_t batch, HistoryOf&& history_of) : rows(batch), first(histories + 1, 0) {
    for (int64_t b = 0; b < batch; ++b) ++first[history_of(b) + 1];
    for (int64_t u = 0; u < histories; ++u) first[u + 1] += first[u];
    std::vector<int64_t> next = first;
    for (int64_t b = 0; b < batch; ++b) rows[next[history_of(b)]++] = b;
  }
};

}  // namespace dien
