// Plans a recurrence: checks index values, orders rows, sizes blocks, chunks and groups, finds memory, picks kernels.
#include "recurrence.h"

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "plan.h"

namespace dien {
namespace {

// The layout rule (docs/design.md, "One layout") for one row, at its first step; `steps_before`: of the rows before it.
Row make_row(const RecurrenceCall& call, const Layout& layout, int64_t b, int64_t u, int64_t steps_before) {
  Row r{};
  r.b = b;
  r.u = u;
  r.length = history_length(layout, u, call.steps);
  r.kept = steps_before;
  if (call.jagged) {
    r.x = layout.offsets[u] * call.x.s1;
    r.dx = layout.offsets[u];
    r.y = r.da = steps_before;
    r.dy = steps_before * call.dy.s1;
    r.attention = steps_before * call.attention.s1;
  } else {
    r.x = u * call.x.s0;
    r.dx = call.time_major ? u : u * call.steps;
    r.y = call.time_major ? b : b * call.steps;
    r.da = b * call.steps;
    r.dy = b * call.dy.s0;
    r.attention = b * call.attention.s0;
  }
  if (layout.reverse && r.length > 0) {
    const int64_t last = r.length - 1;
    r.x += last * call.x.s1;
    r.dx += last * std::abs(call.dx_step);
    r.y += last * std::abs(call.y_step);
    r.da += last;
    r.dy += last * call.dy.s1;
    r.attention += last * call.attention.s1;
  }
  return r;
}

struct Plan {
  std::vector<Row> by_index, sorted, history_rows;
  RowsOfHistories rows_of_histories;
};

void plan_rows(RecurrenceCall& call, const Layout& layout, Plan& plan) {
  const int64_t sign = layout.reverse ? -1 : 1;
  call.x_step = sign * call.x.s1;
  call.dx_step = sign * (call.time_major ? call.histories : 1);
  call.y_step = sign * (call.time_major ? call.batch : 1);
  call.dy_step = sign * call.dy.s1;
  call.attention_step = sign * call.attention.s1;
  call.da_step = sign;

  plan.by_index.reserve(call.batch);
  int64_t steps_before = 0;
  for (int64_t b = 0; b < call.batch; ++b) {
    plan.by_index.push_back(make_row(call, layout, b, layout.history ? layout.history[b] : b, steps_before));
    steps_before += plan.by_index.back().length;
  }
  if (call.jagged && call.shared && layout.attention_rows != steps_before)
    reject("attention must have one value for each of the " + std::to_string(steps_before) +
           " steps of the histories named, got " + std::to_string(layout.attention_rows));

  plan.sorted = plan.by_index;
  std::stable_sort(plan.sorted.begin(), plan.sorted.end(),
                   [](const Row& a, const Row& b) { return a.length > b.length; });
  call.by_index = plan.by_index.data();
  call.rows = plan.sorted.data();
  call.longest = plan.sorted.empty() ? 0 : plan.sorted[0].length;

  if (!call.shared) return;
  for (int64_t u = 0; u < call.histories; ++u) plan.history_rows.push_back(make_row(call, layout, u, u, 0));
  plan.rows_of_histories = RowsOfHistories(call.histories, call.batch, [&](int64_t b) { return plan.by_index[b].u; });
  call.history_rows = plan.history_rows.data();
  call.first_of_history = plan.rows_of_histories.first.data();
  call.rows_of_history = plan.rows_of_histories.rows.data();
}

const Kernels& pick_kernels(const RecurrenceCall& call) {
  const IsaKernels& isa = isa_kernels();
  if (call.x.store == Store::f64) return isa.f64;
  if (isa.narrow.lanes == 0) return isa.wide;
  const auto idle = [&](int64_t lanes) { return (call.hidden + lanes - 1) / lanes * lanes - call.hidden; };
  // Half the lanes cost half as much on machines that split wide registers, and never less than that elsewhere.
  return 8 * (idle(isa.wide.lanes) - idle(isa.narrow.lanes)) > call.hidden ? isa.narrow : isa.wide;
}

// None of these sizes depends on the number of threads, nor therefore do the sums.
void plan_blocks(RecurrenceCall& call) {
  call.block_rows = call.batch >= 512 ? 32 : call.batch >= 64 ? 16 : 8;
  const int64_t width = call.x.store == Store::f64 ? 8 : 4;
  const int64_t token = width * (2 * call.input + 6 * call.hidden);
  call.chunk_tokens = std::clamp<int64_t>((512 << 10) / token, 64, 512);
}

// Up to so many steps the weights are faster read as they lie: packing costs what four steps do.
constexpr int64_t kUnpackedTokens = 4;

bool in_place(const Array& x, const Array& w) { return x.store != Store::bf16 && w.s1 == 1; }

void run(RecurrenceCall call, const Layout& layout) {
  Plan plan;
  check_layout(layout, call.histories, call.steps, call.batch);
  plan_rows(call, layout, plan);
  plan_blocks(call);
  int64_t tokens = 0;
  for (const Row& r : plan.by_index) tokens += r.length;
  call.unpacked = !call.backward && !call.gates && !call.shared && tokens <= kUnpackedTokens &&
                  in_place(call.x, call.w_ih) && in_place(call.x, call.w_hh);
  const int64_t blocks = (call.batch + call.block_rows - 1) / call.block_rows;
  limit_threads(call.threads, tokens * 3 * call.hidden * (call.input + call.hidden));
  call.threads.count = int(std::clamp<int64_t>(call.threads.count, 1, std::max<int64_t>(blocks, 1)));

  const Kernels& kernels = pick_kernels(call);
  Workspace& workspace = call.workspace;
  workspace.sizes = kernels.recurrence.sizes(call);
  if (call.backward) {
    // A group's sums are cleared and added up once: worth it from some tokens on, and within 16 MiB for all groups.
    const int64_t most = std::min(std::clamp<int64_t>((16 << 20) / workspace.sizes.sums, 4, 64), tokens / 64);
    workspace.groups = std::clamp<int64_t>(most, 1, std::max<int64_t>(blocks, 1));
  }
  if (call.shared) {
    workspace.projection_rows = call.jagged ? layout.x_rows : checked_product(call.histories, call.steps);
    if (call.backward)
      workspace.gradient_rows = call.jagged ? layout.attention_rows : checked_product(call.batch, call.steps);
  }
  run_kernel(call, kernels.recurrence);
}

}  // namespace

void recurrence_forward(RecurrenceCall call, const Layout& layout) {
  call.backward = false;
  run(call, layout);
}

void recurrence_backward(RecurrenceCall call, const Layout& layout) {
  call.backward = true;
  run(call, layout);
}

}  // namespace dien
