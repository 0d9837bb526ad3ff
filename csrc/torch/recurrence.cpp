// The recurrence's raw ops for CPU tensors: torch's stable ABI on one side, raw pointers on the other.
// Sizes and dtypes were checked by dien_kernels/ops/recurrence/op.py; values are checked by cpu/recurrence.cpp.
#include "../cpu/recurrence.h"

#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "tensors.h"

namespace {

using namespace dien::bound;

struct Cell {
  double alpha0, alpha1, beta0, beta1;
  bool scale_input, keep_side, reset_before, reverse, time_major;
};

dien::RecurrenceCall make_call(const Tensor& x, const Maybe& attention, const Tensor& w_ih, const Tensor& w_hh,
                               const Maybe& b_ih, const Maybe& b_hh, const Maybe& h0, const Maybe& offsets,
                               const Maybe& history, const Cell& cell) {
  dien::RecurrenceCall call{};
  call.jagged = offsets.has_value();
  call.shared = history.has_value();
  call.time_major = cell.time_major;
  const int64_t lead = x.size(0), next = x.size(1);
  call.histories = call.jagged ? offsets->size(0) - 1 : cell.time_major ? next : lead;
  call.batch = call.shared ? history->size(0) : call.histories;
  call.steps = call.jagged ? 0 : cell.time_major ? lead : next;
  call.input = w_ih.size(1);
  call.hidden = w_hh.size(1);
  call.alpha0 = cell.alpha0, call.alpha1 = cell.alpha1, call.beta0 = cell.beta0, call.beta1 = cell.beta1;
  call.scale_input = cell.scale_input, call.keep_side = cell.keep_side, call.reset_before = cell.reset_before;
  call.x = array_of(x, call.jagged ? 1 : 0, cell.time_major);
  call.attention = array_of(attention, call.jagged ? 1 : 0);
  call.w_ih = array_of(w_ih, 0, false);
  call.w_hh = array_of(w_hh, 0, false);
  call.b_ih = array_of(b_ih, 0);
  call.b_hh = array_of(b_hh, 0);
  call.h0 = array_of(h0, 0);
  call.threads = threads();
  return call;
}

dien::Layout make_layout(const Tensor& x, const Maybe& attention, const Maybe& lengths, const Maybe& offsets,
                         const Maybe& history, bool reverse, Indices& indices) {
  return {indices.read(lengths),
          indices.read(offsets),
          indices.read(history),
          x.size(0),
          attention ? attention->size(0) : x.size(0),
          reverse};
}

int64_t kept_values(int64_t hidden) { return 4 * dien::round_up(hidden, dien::kKeptUnits); }

// The backward walks over what the forward returned as it was: dense.
void check_kept(const char* name, const Tensor& kept, int64_t values) {
  if (!kept.is_contiguous() || kept.numel() != values)
    throw std::invalid_argument(std::string(name) + " must be contiguous with " + std::to_string(values) +
                                " values, as the forward returned it, got " +
                                (kept.is_contiguous() ? "" : "a non-contiguous tensor with ") +
                                std::to_string(kept.numel()));
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, Maybe attention, Tensor w_ih, Tensor w_hh, Maybe b_ih, Maybe b_hh,
                                           Maybe h0, Maybe lengths, Maybe offsets, Maybe history,
                                           Maybe /* order: rows are ordered here */, double alpha0, double alpha1,
                                           double beta0, double beta1, bool scale_input, bool keep_side,
                                           bool reset_before, bool reverse, bool time_major, int64_t kept_units) {
  const Cell cell{alpha0, alpha1, beta0, beta1, scale_input, keep_side, reset_before, reverse, time_major};
  dien::RecurrenceCall call = make_call(x, attention, w_ih, w_hh, b_ih, b_hh, h0, offsets, history, cell);
  Indices indices;
  const dien::Layout layout = make_layout(x, attention, lengths, offsets, history, reverse, indices);
  const ScalarType storage = x.scalar_type(), compute = compute_type(storage);
  const int64_t hidden = call.hidden, rows = layout.attention_rows;
  const int64_t first = time_major ? call.steps : call.batch, second = time_major ? call.batch : call.steps;
  Tensor y = large(call.jagged ? new_tensor({rows, hidden}, storage) : new_tensor({first, second, hidden}, storage));
  Tensor h_n = new_tensor({call.batch, hidden}, storage);
  if (kept_units != 0 && kept_units != dien::kKeptUnits)
    throw std::invalid_argument("kept_units must be 0 or " + std::to_string(dien::kKeptUnits) + ", got " +
                                std::to_string(kept_units));
  const bool keep_gates = kept_units != 0;
  const int64_t kept = kept_values(hidden);
  Tensor gates = !keep_gates   ? new_tensor({0}, compute)
                 : call.jagged ? large(new_tensor({rows, kept}, compute))
                               : large(new_tensor({first, second, kept}, compute));
  call.y = y.mutable_data_ptr();
  call.h_n = h_n.mutable_data_ptr();
  call.gates = keep_gates ? gates.mutable_data_ptr() : nullptr;
  dien::recurrence_forward(call, layout);
  return {y, h_n, gates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Maybe dy, Maybe dh_n, Tensor x, Maybe attention, Tensor w_ih, Tensor w_hh, Maybe b_ih, Maybe b_hh, Maybe h0,
    Maybe lengths, Maybe offsets, Maybe history, Maybe /* order */, Tensor y, Tensor gates, bool need_dx, double alpha0,
    double alpha1, double beta0, double beta1, bool scale_input, bool keep_side, bool reset_before, bool reverse,
    bool time_major, int64_t /* kept_units: gates say it */) {
  const Cell cell{alpha0, alpha1, beta0, beta1, scale_input, keep_side, reset_before, reverse, time_major};
  dien::RecurrenceCall call = make_call(x, attention, w_ih, w_hh, b_ih, b_hh, h0, offsets, history, cell);
  Indices indices;
  const dien::Layout layout = make_layout(x, attention, lengths, offsets, history, reverse, indices);
  const int64_t steps = call.jagged ? layout.attention_rows : call.batch * call.steps;
  check_kept("y", y, steps * call.hidden);
  if (gates.numel() > 0) check_kept("kept", gates, steps * kept_values(call.hidden));
  const ScalarType storage = x.scalar_type(), compute = compute_type(storage);
  Tensor dx = need_dx ? large(new_like(x, storage)) : new_tensor({0}, storage);
  Tensor da = attention ? new_like(*attention, compute) : new_tensor({0}, storage);
  Tensor dw_ih = new_like(w_ih, w_ih.scalar_type()), dw_hh = new_like(w_hh, w_hh.scalar_type());
  Tensor db_ih = new_tensor({3 * call.hidden}, compute), db_hh = new_tensor({3 * call.hidden}, compute);
  Tensor dh0 = new_tensor({call.batch, call.hidden}, compute);
  call.dy = array_of(dy, call.jagged ? 1 : 0, time_major);
  call.dh_n = array_of(dh_n, 0);
  call.y = const_cast<void*>(y.const_data_ptr());
  call.gates = gates.numel() > 0 ? const_cast<void*>(gates.const_data_ptr()) : nullptr;
  call.dx = need_dx ? dx.mutable_data_ptr() : nullptr;
  call.da = attention ? da.mutable_data_ptr() : nullptr;
  call.dw_ih = dw_ih.mutable_data_ptr();
  call.dw_hh = dw_hh.mutable_data_ptr();
  call.db_ih = db_ih.mutable_data_ptr();
  call.db_hh = db_hh.mutable_data_ptr();
  call.dh0 = dh0.mutable_data_ptr();
  dien::recurrence_backward(call, layout);
  return {dx, da, dw_ih, dw_hh, db_ih, db_hh, dh0};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dien_kernels, CPU, m) {
  m.impl("_recurrence_cpu_fwd", TORCH_BOX(&forward));
  m.impl("_recurrence_cpu_bwd", TORCH_BOX(&backward));
}
