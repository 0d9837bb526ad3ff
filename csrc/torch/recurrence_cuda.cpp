// The recurrence's launches for CUDA tensors: torch's stable ABI on one side, parameters and a stream on the other.
// Everything was checked, padded and allocated by dien_kernels/ops/recurrence/cuda_launch.py. Nothing waits for the device.
#ifdef DIEN_WITH_CUDA
#include "../cuda/launch.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// Torch's current stream of a device. Its function is in libtorch_cuda alone, which torch for the CPU does not have, so
// it is looked up where tensors on a GPU prove that it is there.
dien::cuda::Stream current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  if (!get || get(device, &stream)) throw std::runtime_error("dien_kernels: torch's current CUDA stream is not known");
  return static_cast<dien::cuda::Stream>(stream);
}

void check(int error, const char* what) {
  if (error == dien::cuda::kNone) return;
  std::string words = std::string("dien_kernels: launching ") + what + ": " + dien::cuda::words_of(error);
  if (error == dien::cuda::kNoKernelImage) words += " (build with DIEN_KERNELS_CUDA_ARCHS for this device)";
  throw std::runtime_error(words);
}

template <class T = void>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T = void>
const T* read(const Maybe& t) {
  return t ? read<T>(*t) : nullptr;
}

template <class T = void>
T* write(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

struct Sizes {
  int64_t batch, histories, steps, x_rows, y_rows;
  bool reverse, time_major;
};

dien::cuda::Rows rows_of(const Maybe& order, const Maybe& lengths, const Maybe& offsets, const Maybe& history,
                         const Maybe& y_start, const Sizes& s) {
  return {read<int64_t>(order),
          read<int64_t>(lengths),
          read<int64_t>(offsets),
          read<int64_t>(history),
          read<int64_t>(y_start),
          s.batch,
          s.histories,
          s.steps,
          s.x_rows,
          s.y_rows,
          s.reverse,
          s.time_major};
}

dien::cuda::Cell cell_of(double alpha0, double alpha1, double beta0, double beta1, bool scale_input, bool keep_side,
                         bool reset_before, const Tensor& w_hh) {
  return {float(alpha0), float(alpha1), float(beta0), float(beta1),
          scale_input,   keep_side,     reset_before, int32_t(w_hh.size(1))};
}

void forward(Maybe order, Maybe lengths, Maybe offsets, Maybe history, Maybe y_start, Tensor projection,
             Maybe attention, Tensor w_hh, Maybe b_ih, Maybe b_hh, Maybe h0, int64_t batch, int64_t histories,
             int64_t steps, int64_t x_rows, int64_t y_rows, bool reverse, bool time_major, double alpha0, double alpha1,
             double beta0, double beta1, bool scale_input, bool keep_side, bool reset_before, int64_t padded,
             Maybe w_ih, Maybe streamed, Maybe y, Tensor h_n, int64_t rows, int64_t eights) {
  const Sizes sizes{batch, histories, steps, x_rows, y_rows, reverse, time_major};
  const dien::cuda::Forward p{
      {rows_of(order, lengths, offsets, history, y_start, sizes),
       cell_of(alpha0, alpha1, beta0, beta1, scale_input, keep_side, reset_before, w_hh), read(projection),
       read<float>(attention), read(w_hh), read<float>(b_ih), read<float>(b_hh), read<float>(h0)},
      y ? write(*y) : nullptr,
      write(h_n),
      read(w_ih),
      w_ih ? int32_t(w_ih->size(1)) : 0,
      int32_t(eights),
      read(streamed),
      0,
      dien::cuda::update_factor(keep_side)};
  const torch::stable::accelerator::DeviceGuard guard(h_n.get_device());
  const dien::cuda::Stream stream = current_stream(h_n.get_device());
  const auto launch = h_n.scalar_type() == ScalarType::BFloat16 ? dien::cuda::forward_bf16
                      : h_n.scalar_type() == ScalarType::Half   ? dien::cuda::forward_f16
                                                                : dien::cuda::forward_f32;
  check(launch(p, int(padded), int(rows), stream), "the recurrence's forward");
}

void backward(Maybe order, Maybe lengths, Maybe offsets, Maybe history, Maybe y_start, Tensor projection,
              Maybe attention, Tensor w_hh, Maybe b_ih, Maybe b_hh, Maybe h0, int64_t batch, int64_t histories,
              int64_t steps, int64_t x_rows, int64_t y_rows, bool reverse, bool time_major, double alpha0,
              double alpha1, double beta0, double beta1, bool scale_input, bool keep_side, bool reset_before,
              int64_t padded, Tensor y, Maybe dy, Maybe dh_n, Maybe fragments, Tensor gates, Tensor states,
              Maybe d_attention, Tensor d_bias, Tensor dh0) {
  const Sizes sizes{batch, histories, steps, x_rows, y_rows, reverse, time_major};
  const dien::cuda::Backward p{
      {rows_of(order, lengths, offsets, history, y_start, sizes),
       cell_of(alpha0, alpha1, beta0, beta1, scale_input, keep_side, reset_before, w_hh), read(projection),
       read<float>(attention), read(w_hh), read<float>(b_ih), read<float>(b_hh), read<float>(h0)},
      read(y),
      read(dy),
      read(dh_n),
      read(fragments),
      write(gates),
      write(states),
      d_attention ? write<float>(*d_attention) : nullptr,
      write<float>(d_bias),
      write<float>(dh0)};
  const torch::stable::accelerator::DeviceGuard guard(y.get_device());
  const dien::cuda::Stream stream = current_stream(y.get_device());
  const auto launch = y.scalar_type() == ScalarType::BFloat16 ? dien::cuda::backward_bf16
                      : y.scalar_type() == ScalarType::Half   ? dien::cuda::backward_f16
                                                              : dien::cuda::backward_f32;
  check(launch(p, int(padded), stream), "the recurrence's backward");
}

void sum_readers(Tensor gates, Tensor dgx, Tensor readers, Tensor first, Maybe lengths, Maybe offsets, Maybe y_start,
                 int64_t batch, int64_t histories, int64_t steps, int64_t x_rows, int64_t y_rows, bool time_major) {
  const Sizes sizes{batch, histories, steps, x_rows, y_rows, false, time_major};
  const dien::cuda::SumReaders p{rows_of({}, lengths, offsets, {}, y_start, sizes),
                                 read(gates),
                                 write(dgx),
                                 read<int64_t>(readers),
                                 read<int64_t>(first),
                                 int32_t(dgx.size(1)),
                                 int32_t(gates.stride(0))};
  const torch::stable::accelerator::DeviceGuard guard(dgx.get_device());
  const auto store = dgx.scalar_type() == ScalarType::BFloat16 ? dien::cuda::Store::bf16
                     : dgx.scalar_type() == ScalarType::Half   ? dien::cuda::Store::f16
                                                               : dien::cuda::Store::f32;
  check(dien::cuda::sum_readers(p, store, current_stream(dgx.get_device())), "the sum over a history's rows");
}

int64_t driver_version() { return dien::cuda::driver_version(); }

int64_t runtime_version() { return dien::cuda::runtime_version(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dien_kernels, CUDA, m) {
  m.impl("_cuda_recurrence_forward", TORCH_BOX(&forward));
  m.impl("_cuda_recurrence_backward", TORCH_BOX(&backward));
  m.impl("_cuda_recurrence_sum_readers", TORCH_BOX(&sum_readers));
}

STABLE_TORCH_LIBRARY_IMPL(dien_kernels, CompositeExplicitAutograd, m) {
  m.impl("_cuda_driver_version", TORCH_BOX(&driver_version));
  m.impl("_cuda_runtime_version", TORCH_BOX(&runtime_version));
}
#endif
