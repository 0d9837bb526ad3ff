#include "layout.h"

#include <algorithm>
#include <utility>

namespace dien {

void check_layout(const Layout& layout, int64_t histories, int64_t steps, int64_t batch) {
  const auto range = [](const int64_t* p, int64_t n) {
    const auto [low, high] = std::minmax_element(p, p + n);
    return std::pair(*low, *high);
  };
  if (layout.lengths && histories > 0) {
    const auto [low, high] = range(layout.lengths, histories);
    if (low < 0 || high > steps)
      reject("lengths must lie between 0 and T = " + std::to_string(steps) + ", got values from " +
             std::to_string(low) + " to " + std::to_string(high));
  }
  if (layout.offsets) {
    const int64_t* o = layout.offsets;
    if (o[0] != 0) reject("offsets must start with 0, got " + std::to_string(o[0]));
    for (int64_t u = 0; u < histories; ++u)
      if (o[u + 1] < o[u])
        reject("offsets must be ascending, got " + std::to_string(o[u]) + " before " + std::to_string(o[u + 1]));
    if (o[histories] != layout.x_rows)
      reject("offsets must end with N = " + std::to_string(layout.x_rows) + ", the rows of the jagged input, got " +
             std::to_string(o[histories]));
  }
  if (layout.history && batch > 0) {
    const auto [low, high] = range(layout.history, batch);
    if (low < 0 || high >= histories)
      reject("history must lie between 0 and U - 1 = " + std::to_string(histories - 1) + ", got values from " +
             std::to_string(low) + " to " + std::to_string(high));
  }
}

}  // namespace dien
