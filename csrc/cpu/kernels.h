// Gathers the pieces of one instruction set: included once by each isa_*.cpp, inside its namespace.

#include "../cell.h"
#include "simd.h"
#include "gemm.h"
#include "block.h"
#include "recurrence_fwd.h"
#include "recurrence_few.h"
#include "recurrence_bwd.h"
#include "mlp.h"
#include "attention_kernel.h"
#include "auxiliary_loss_kernel.h"

template <class L>
Sizes sizes(const Job& job, bool backward) {
  const Shape<L> shape(job);
  Arena packed{nullptr}, scratch{nullptr};
  Weights<L>(job, shape, packed, backward);
  if (backward)
    typename Backward<L>::Scratch(job, shape, scratch);
  else if (job.few)
    typename Few<L>::Scratch(shape, scratch);
  else
    typename Forward<L>::Scratch(job, shape, scratch);
  return {packed.used, Backward<L>::partial_bytes(shape), 3 * shape.Hp * int64_t(sizeof(typename L::Scalar)),
          scratch.used};
}

template <class L>
void project_histories(const Job& job, const Shape<L>& shape, const Weights<L>& weights) {
  using T = typename L::Scalar;
  run_tasks(job, job.histories, [&](char* scratch, int64_t u) {
    if (!is_read(job, u)) return;
    project_history<L>(job, shape, weights, job.history_rows[u], reinterpret_cast<T*>(scratch),
                       reinterpret_cast<T*>(job.projection));
  });
}

template <class L>
void forward(const Job& job) {
  const Shape<L> shape(job);
  Arena arena{job.packed};
  const Weights<L> weights(job, shape, arena, false);
  weights.fill(job, shape, false);
  if (job.few) return Few<L>{job, shape, weights}.run(job.scratch);
  if (projects(job, false)) project_histories<L>(job, shape, weights);
  const Forward<L> kernel{job, shape, weights};
  run_tasks(job, block_count(job), [&](char* scratch, int64_t i) { kernel.run_block(scratch, i); });
}

template <class L>
void backward(const Job& job) {
  const Shape<L> shape(job);
  Arena arena{job.packed};
  const Weights<L> weights(job, shape, arena, true);
  weights.fill(job, shape, true);
  if (projects(job, true)) project_histories<L>(job, shape, weights);
  const Backward<L> kernel{job, shape, weights};
  run_tasks(job, job.groups, [&](char* scratch, int64_t g) { kernel.run_group(scratch, g); });
  if (job.shared) run_tasks(job, job.groups, [&](char* scratch, int64_t g) { kernel.run_history_group(scratch, g); });
  run_tasks(job, 3 * job.hidden, [&](char* scratch, int64_t row) {
    kernel.reduce_row(row, reinterpret_cast<typename L::Scalar*>(scratch));
  });
}

template <class T, int N>
constexpr Kernels kernels_of() {
  using L = Lanes<T, N>;
  return {N,
          &sizes<L>,
          &forward<L>,
          &backward<L>,
          &Attention<L>::lay_out,
          &Attention<L>::run,
          &AuxiliaryLoss<L>::lay_out,
          &AuxiliaryLoss<L>::run};
}
