// Plans an auxiliary loss: checks index values, lists the pairs with their weights (L5), sizes chunks and groups, finds
// memory, and writes the zeros of what belongs to no pair.
#include "auxiliary_loss.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "mlp_plan.h"

namespace dien {
namespace {

constexpr int64_t kChunkBytes = 160 << 10;  // of activations: beside the weights they stay in the second-level cache

struct Plan {
  std::vector<Pair> pairs;
  std::vector<double> positive, negative;  // weights, by row
};

Plan plan_pairs(const AuxiliaryLossCall& call, const Layout& layout, int64_t batch, int64_t steps,
                Normalizer normalizer) {
  Plan plan;
  std::vector<int64_t> counts(batch);
  int64_t total = 0;
  for (int64_t b = 0; b < batch; ++b)
    total += counts[b] = std::max<int64_t>(history_length(layout, b, steps) - call.ahead, 0);
  plan.pairs.reserve(total);
  const double k = double(call.negatives), slots = double(batch) * double(std::max<int64_t>(steps - call.ahead, 0));
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
void clear_rest(const AuxiliaryLossCall& call, const Layout& layout, int64_t batch, int64_t steps) {
  const int64_t bytes = value_bytes(call.states.store);
  const auto clear = [bytes](void* p, int64_t from, int64_t to, int64_t width) {
    if (to > from) std::memset(static_cast<char*>(p) + from * width * bytes, 0, (to - from) * width * bytes);
  };
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t first = layout.offsets ? layout.offsets[b] : b * steps;
    const int64_t end = layout.offsets ? layout.offsets[b + 1] : first + steps;
    const int64_t count = std::max<int64_t>(history_length(layout, b, steps) - call.ahead, 0);
    clear(call.dstates, first + count, end, call.hidden);
    const auto clear_behaviours = [&](void* p, int64_t width) {
      clear(p, first, std::min(first + call.ahead, end), width);
      clear(p, first + call.ahead + count, end, width);
    };
    clear_behaviours(call.dpositive, call.size);
    clear_behaviours(call.dnegative, call.negatives * call.size);
  }
}

}  // namespace

double auxiliary_loss(AuxiliaryLossCall call, const Layout& layout, int64_t batch, int64_t steps,
                      Normalizer normalizer) {
  const int64_t each = 1 + call.negatives;
  check_size(batch, steps);
  check_size(each, call.hidden);
  check_size(each, call.size);
  check_layout(layout, batch, steps, batch);
  const Plan plan = plan_pairs(call, layout, batch, steps, normalizer);
  call.pairs = plan.pairs.data();
  call.count = int64_t(plan.pairs.size());
  call.positive_weight = plan.positive.data();
  call.negative_weight = plan.negative.data();
  call.dense_row = layout.offsets ? 0 : steps;
  if (call.backward) clear_rest(call, layout, batch, steps);

  const MlpCost cost = mlp_cost(call.mlp, call.size);
  for (int64_t i = 0; i < call.mlp.count; ++i) check_size(call.mlp.layers[i].out, each);
  const int64_t width = call.size + cost.width, bytes = value_bytes(call.states.store);
  // None of these sizes depends on the number of threads, nor therefore do the sums.
  call.chunk_pairs = std::clamp<int64_t>(kChunkBytes / (bytes * width * each), 4, 64);
  call.workspace.groups = std::clamp<int64_t>(call.count * each / 256, 1, kMostGroups);
  limit_threads(call.threads, call.count * each * (call.size + cost.products));
  std::vector<double> losses(call.workspace.groups);
  call.losses = losses.data();
  const Kernel<AuxiliaryLossCall>& kernel = mlp_kernels(call.states.store).auxiliary_loss;
  call.workspace.sizes = kernel.sizes(call);
  run_kernel(call, kernel);
  double loss = 0;
  for (const double part : losses) loss += part;
  return loss;
}

}  // namespace dien
