// Plans an auxiliary loss: checks index values, lists the pairs with their weights (L5), sizes chunks and groups, finds
// memory, and writes the zeros of what belongs to no pair.
#include "auxiliary_loss.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "unit_plan.h"

namespace dien {
namespace {

constexpr int64_t kChunkBytes = 160 << 10;  // of activations: beside the weights they stay in the second-level cache

struct Plan {
  std::vector<Pair> pairs;
  std::vector<double> positive, negative;  // weights, by row
};

Plan plan_pairs(const AuxiliaryJob& job, const Layout& layout, int64_t batch, int64_t steps, Normalizer normalizer) {
  Plan plan;
  std::vector<int64_t> counts(batch);
  int64_t total = 0;
  for (int64_t b = 0; b < batch; ++b)
    total += counts[b] = std::max<int64_t>(history_length(layout, b, steps) - job.ahead, 0);
  plan.pairs.reserve(total);
  const double k = double(job.negatives), slots = double(batch) * double(std::max<int64_t>(steps - job.ahead, 0));
  const double all = double(total);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t first = layout.offsets ? layout.offsets[b] : 0, row = layout.offsets ? 0 : b;
    for (int64_t t = 0; t < counts[b]; ++t) plan.pairs.push_back({row, first + t, b});
    double positive = 0, negative = 0;
    if (counts[b] > 0) switch (normalizer) {
        case Normalizer::joint:
          positive = negative = 1 / (all * (1 + k));
          break;
        case Normalizer::separate:
          positive = 1 / all, negative = 1 / (all * k);
          break;
        case Normalizer::padded:
          positive = negative = 1 / slots;
          break;
        case Normalizer::row:
          positive = negative = 1 / (double(batch) * double(counts[b]) * (1 + k));
          break;
      }
    plan.positive.push_back(positive);
    plan.negative.push_back(negative);
  }
  return plan;
}

// Zeros where no pair writes.
void clear_rest(const AuxiliaryJob& job, const Layout& layout, int64_t batch, int64_t steps) {
  const int64_t bytes = value_bytes(job.states.store);
  const auto clear = [bytes](void* p, int64_t from, int64_t to, int64_t width) {
    if (to > from) std::memset(static_cast<char*>(p) + from * width * bytes, 0, (to - from) * width * bytes);
  };
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t first = layout.offsets ? layout.offsets[b] : b * steps;
    const int64_t end = layout.offsets ? layout.offsets[b + 1] : first + steps;
    const int64_t count = std::max<int64_t>(history_length(layout, b, steps) - job.ahead, 0);
    clear(job.dstates, first + count, end, job.hidden);
    const auto clear_behaviours = [&](void* p, int64_t width) {
      clear(p, first, std::min(first + job.ahead, end), width);
      clear(p, first + job.ahead + count, end, width);
    };
    clear_behaviours(job.dpositive, job.size);
    clear_behaviours(job.dnegative, job.negatives * job.size);
  }
}

}  // namespace

double auxiliary_loss(AuxiliaryJob job, const Layout& layout, int64_t batch, int64_t steps, Normalizer normalizer) {
  const int64_t each = 1 + job.negatives;
  check_piece(batch, steps);
  check_piece(each, job.hidden);
  check_piece(each, job.size);
  check_layout(layout, batch, steps, batch);
  const Plan plan = plan_pairs(job, layout, batch, steps, normalizer);
  job.pairs = plan.pairs.data();
  job.count = int64_t(plan.pairs.size());
  job.positive_weight = plan.positive.data();
  job.negative_weight = plan.negative.data();
  job.dense_row = layout.offsets ? 0 : steps;
  if (job.backward) clear_rest(job, layout, batch, steps);

  const MlpCost cost = mlp_cost(job.mlp, job.size);
  for (int64_t i = 0; i < job.mlp.count; ++i) check_piece(job.mlp.layers[i].out, each);
  const int64_t width = job.size + cost.width, bytes = value_bytes(job.states.store);
  // None of these sizes depends on the number of threads, nor therefore do the sums.
  job.chunk_pairs = std::clamp<int64_t>(kChunkBytes / (bytes * width * each), 4, 64);
  job.room.groups = std::clamp<int64_t>(job.count * each / 256, 1, kMostGroups);
  limit_threads(job.threads, job.count * each * (job.size + cost.products));
  std::vector<double> losses(job.room.groups);
  job.losses = losses.data();
  const Kernels& kernels = unit_kernels(job.states.store);
  kernels.lay_out_auxiliary(job);
  const Memory memory = allocate(job.room, job.threads);
  kernels.auxiliary(job);
  double loss = 0;
  for (const double part : losses) loss += part;
  return loss;
}

}  // namespace dien
