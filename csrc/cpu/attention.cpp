// Plans attention scores: checks index values, finds every target's steps, sizes chunks and groups, finds memory.
#include "attention.h"

#include <algorithm>
#include <string>
#include <vector>

#include "unit_plan.h"

namespace dien {
namespace {

// What a chunk's activations may take of the second-level cache.
constexpr int64_t kChunkBytes = 192 << 10;

std::vector<Target> plan_targets(const AttentionJob& job, const Layout& layout, const Mask& mask, int64_t steps) {
  std::vector<Target> targets(job.batch);
  int64_t before = 0;  // steps of the targets so far
  for (int64_t b = 0; b < job.batch; ++b) {
    const int64_t u = layout.history ? layout.history[b] : b;
    const bool jagged = layout.offsets;
    Target& t = targets[b];
    t.u = u;
    t.length = history_length(layout, u, steps);
    t.states = jagged ? layout.offsets[u] * job.states.s1 : u * job.states.s0;
    t.mask = u * mask.s0;
    t.scores = jagged ? before : b * steps;
    t.da = jagged ? before * job.da.s1 : b * job.da.s0;
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

void attention(AttentionJob job, const Layout& layout, const Mask& mask, int64_t steps) {
  check_piece(job.size, job.hidden);
  check_piece(job.histories, 1);
  check_piece(job.batch, 1);
  const std::vector<Target> targets = plan_targets(job, layout, mask, steps);
  const Readers readers(job.histories, job.batch, [&](int64_t b) { return targets[b].u; });
  std::vector<int64_t> state_rows(job.histories + 1);
  for (int64_t u = 0; u <= job.histories; ++u) state_rows[u] = layout.offsets ? layout.offsets[u] : u * steps;
  job.mask = mask.data;
  job.mask_step = mask.s1;
  job.targets = targets.data();
  job.readers = readers.rows.data();
  job.first_reader = readers.first.data();
  job.state_rows = state_rows.data();

  int64_t tokens = 0;
  for (const Target& t : targets) {
    job.longest = std::max(job.longest, t.length);
    tokens += t.length;
  }
  check_piece(job.longest, job.hidden);
  const MlpCost cost = mlp_cost(job.mlp, job.hidden);
  const int64_t width = 2 * job.hidden + cost.width, bytes = value_bytes(job.states.store);
  // None of these sizes depends on the number of threads, nor therefore do the sums.
  job.chunk_tokens = std::clamp<int64_t>(kChunkBytes / (bytes * width), 16, 128);
  job.room.groups = std::clamp<int64_t>(std::min(kMostGroups, tokens / 64), 1, std::max<int64_t>(job.histories, 1));
  limit_threads(job.threads, tokens * (job.hidden + cost.products));
  const Kernels& kernels = unit_kernels(job.states.store);
  kernels.lay_out_attention(job);
  const Memory memory = allocate(job.room, job.threads);
  kernels.attention(job);
}

}  // namespace dien
