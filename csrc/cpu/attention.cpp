// Plans attention scores: checks index values, finds every target's steps, sizes chunks and groups, finds memory.
#include "attention.h"

#include <algorithm>
#include <string>
#include <vector>

#include "mlp_plan.h"

namespace dien {
namespace {

// What a chunk's activations may take of the second-level cache.
constexpr int64_t kChunkBytes = 192 << 10;

std::vector<Target> plan_targets(const AttentionCall& call, const Layout& layout, const Mask& mask, int64_t steps) {
  std::vector<Target> targets(call.batch);
  int64_t before = 0;  // steps of the targets so far
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t u = layout.history ? layout.history[b] : b;
    const bool jagged = layout.offsets;
    Target& t = targets[b];
    t.u = u;
    t.length = history_length(layout, u, steps);
    t.states = jagged ? layout.offsets[u] * call.states.s1 : u * call.states.s0;
    t.mask = u * mask.s0;
    t.scores = jagged ? before : b * steps;
    t.da = jagged ? before * call.da.s1 : b * call.da.s0;
    before += t.length;
  }
  return targets;
}

}  // namespace

void check_attention(const Layout& layout, int64_t histories, int64_t steps, int64_t batch) {
  check_layout(layout, histories, steps, batch);
  if (!layout.offsets || !layout.history) return;
  int64_t total = 0;
  for (int64_t b = 0; b < batch; ++b) total += history_length(layout, layout.history[b], steps);
  if (total != layout.attention_rows)
    reject("rows_total must be " + std::to_string(total) + ", the steps of the histories named, got " +
           std::to_string(layout.attention_rows));
}

void attention(AttentionCall call, const Layout& layout, const Mask& mask, int64_t steps) {
  check_size(call.size, call.hidden);
  check_size(call.histories, 1);
  check_size(call.batch, 1);
  const std::vector<Target> targets = plan_targets(call, layout, mask, steps);
  const RowsOfHistories rows(call.histories, call.batch, [&](int64_t b) { return targets[b].u; });
  std::vector<int64_t> state_rows(call.histories + 1);
  for (int64_t u = 0; u <= call.histories; ++u) state_rows[u] = layout.offsets ? layout.offsets[u] : u * steps;
  call.mask = mask.data;
  call.mask_step = mask.s1;
  call.targets = targets.data();
  call.rows_of_history = rows.rows.data();
  call.first_of_history = rows.first.data();
  call.state_rows = state_rows.data();

  int64_t tokens = 0;
  for (const Target& t : targets) {
    call.longest = std::max(call.longest, t.length);
    tokens += t.length;
  }
  check_size(call.longest, call.hidden);
  const MlpCost cost = mlp_cost(call.mlp, call.hidden);
  const int64_t width = 2 * call.hidden + cost.width, bytes = value_bytes(call.states.store);
  // None of these sizes depends on the number of threads, nor therefore do the sums.
  call.chunk_tokens = std::clamp<int64_t>(kChunkBytes / (bytes * width), 16, 128);
  call.workspace.groups =
      std::clamp<int64_t>(std::min(kMostGroups, tokens / 64), 1, std::max<int64_t>(call.histories, 1));
  limit_threads(call.threads, tokens * (call.hidden + cost.products));
  const Kernel<AttentionCall>& kernel = mlp_kernels(call.states.store).attention;
  call.workspace.sizes = kernel.sizes(call);
  run_kernel(call, kernel);
}

}  // namespace dien
