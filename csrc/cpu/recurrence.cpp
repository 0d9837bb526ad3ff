// Plans a recurrence: checks index values, orders rows, sizes blocks, chunks and groups, finds memory, picks kernels.
#include "recurrence.h"

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "isa.h"
#include "memory.h"

namespace dien {
namespace {

// The layout rule (docs/design.md, "One layout") for one row, at its first step; `steps_before`: of the rows before it.
Row make_row(const Job& job, const Layout& layout, int64_t b, int64_t u, int64_t steps_before) {
  Row r{};
  r.b = b;
  r.u = u;
  r.length = history_length(layout, u, job.steps);
  r.kept = steps_before;
  if (job.jagged) {
    r.x = layout.offsets[u] * job.x.s1;
    r.dx = layout.offsets[u];
    r.y = r.da = steps_before;
    r.dy = steps_before * job.dy.s1;
    r.attention = steps_before * job.attention.s1;
  } else {
    r.x = u * job.x.s0;
    r.dx = job.time_major ? u : u * job.steps;
    r.y = job.time_major ? b : b * job.steps;
    r.da = b * job.steps;
    r.dy = b * job.dy.s0;
    r.attention = b * job.attention.s0;
  }
  if (layout.reverse && r.length > 0) {
    const int64_t last = r.length - 1;
    r.x += last * job.x.s1;
    r.dx += last * std::abs(job.dx_step);
    r.y += last * std::abs(job.y_step);
    r.da += last;
    r.dy += last * job.dy.s1;
    r.attention += last * job.attention.s1;
  }
  return r;
}

struct Plan {
  std::vector<Row> by_index, sorted, history_rows;
  Readers readers;
};

void plan_rows(Job& job, const Layout& layout, Plan& plan) {
  const int64_t sign = layout.reverse ? -1 : 1;
  job.x_step = sign * job.x.s1;
  job.dx_step = sign * (job.time_major ? job.histories : 1);
  job.y_step = sign * (job.time_major ? job.batch : 1);
  job.dy_step = sign * job.dy.s1;
  job.attention_step = sign * job.attention.s1;
  job.da_step = sign;

  plan.by_index.reserve(job.batch);
  int64_t steps_before = 0;
  for (int64_t b = 0; b < job.batch; ++b) {
    plan.by_index.push_back(make_row(job, layout, b, layout.history ? layout.history[b] : b, steps_before));
    steps_before += plan.by_index.back().length;
  }
  if (job.jagged && job.shared && layout.attention_rows != steps_before)
    reject("attention must have one value for each of the " + std::to_string(steps_before) +
           " steps of the histories named, got " + std::to_string(layout.attention_rows));

  plan.sorted = plan.by_index;
  std::stable_sort(plan.sorted.begin(), plan.sorted.end(),
                   [](const Row& a, const Row& b) { return a.length > b.length; });
  job.by_index = plan.by_index.data();
  job.rows = plan.sorted.data();
  job.longest = plan.sorted.empty() ? 0 : plan.sorted[0].length;

  if (!job.shared) return;
  for (int64_t u = 0; u < job.histories; ++u) plan.history_rows.push_back(make_row(job, layout, u, u, 0));
  plan.readers = Readers(job.histories, job.batch, [&](int64_t b) { return plan.by_index[b].u; });
  job.history_rows = plan.history_rows.data();
  job.first_reader = plan.readers.first.data();
  job.readers = plan.readers.rows.data();
}

const Kernels& pick_kernels(const Job& job) {
  const IsaKernels& isa = isa_kernels();
  if (job.x.store == Store::f64) return isa.f64;
  if (isa.narrow.lanes == 0) return isa.wide;
  const auto idle = [&](int64_t lanes) { return (job.hidden + lanes - 1) / lanes * lanes - job.hidden; };
  // Half the lanes cost half as much on machines that split wide registers, and never less than that elsewhere.
  return 8 * (idle(isa.wide.lanes) - idle(isa.narrow.lanes)) > job.hidden ? isa.narrow : isa.wide;
}

// None of these sizes depends on the number of threads, nor therefore do the sums.
void plan_blocks(Job& job) {
  job.block_rows = job.batch >= 512 ? 32 : job.batch >= 64 ? 16 : 8;
  const int64_t width = job.x.store == Store::f64 ? 8 : 4;
  const int64_t token = width * (2 * job.input + 6 * job.hidden);
  job.chunk_tokens = std::clamp<int64_t>((512 << 10) / token, 64, 512);
}

// Up to here the weights are faster read as they lie: packing costs what four steps do.
constexpr int64_t kFewTokens = 4;

bool in_place(const Array& x, const Array& w) { return x.store != Store::bf16 && w.s1 == 1; }

void run(Job job, const Layout& layout, bool backward) {
  Plan plan;
  check_layout(layout, job.histories, job.steps, job.batch);
  plan_rows(job, layout, plan);
  plan_blocks(job);
  int64_t tokens = 0;
  for (const Row& r : plan.by_index) tokens += r.length;
  job.few = !backward && !job.gates && !job.shared && tokens <= kFewTokens && in_place(job.x, job.w_ih) &&
            in_place(job.x, job.w_hh);
  const Kernels& kernels = pick_kernels(job);
  const Sizes sizes = kernels.sizes(job, backward);
  const int64_t blocks = (job.batch + job.block_rows - 1) / job.block_rows;
  // A group's sums are cleared and added up once: worth it from some tokens on, and within 16 MiB for all groups.
  const int64_t most_groups = std::min(std::clamp<int64_t>((16 << 20) / sizes.partial, 4, 64), tokens / 64);
  job.groups = std::clamp<int64_t>(most_groups, 1, std::max<int64_t>(blocks, 1));
  // Waking threads costs microseconds: the same as some hundred thousand multiplications.
  if (tokens * 3 * job.hidden * (job.input + job.hidden) < 200000) job.threads.count = 1;
  job.threads.count = int(std::clamp<int64_t>(job.threads.count, 1, std::max<int64_t>(blocks, 1)));

  job.scratch_bytes = rounded_bytes(sizes.scratch);
  const int64_t x_rows = job.jagged ? layout.x_rows : checked_product(job.histories, job.steps);
  const int64_t y_rows = job.jagged ? layout.attention_rows : checked_product(job.batch, job.steps);
  const Piece pieces[] = {
      {&job.packed, sizes.packed},
      {&job.partial, backward ? job.groups * sizes.partial : 0},
      {&job.projection, job.shared ? checked_product(x_rows, sizes.projection_row) : 0},
      {&job.shared_gradient, job.shared && backward ? checked_product(y_rows, sizes.projection_row) : 0},
      {&job.scratch, job.threads.count * job.scratch_bytes},
  };
  const Memory memory = allocate(pieces);
  (backward ? kernels.backward : kernels.forward)(job);
}

}  // namespace

void recurrence_forward(Job job, const Layout& layout) { run(job, layout, false); }
void recurrence_backward(Job job, const Layout& layout) { run(job, layout, true); }

}  // namespace dien
