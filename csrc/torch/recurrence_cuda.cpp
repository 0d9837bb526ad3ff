// The recurrence's launches for CUDA tensors: torch's stable ABI on one side, parameters and a stream on the other.
// Everything was checked, padded and allocated by dien_kernels/ops/recurrence/cuda_launch.py. Nothing waits for the device.
#ifdef DIEN_WITH_CUDA
#include "../cuda/launch.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

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

// The whole numbers of a launch, in the order of `Numbers` in cuda_launch.py; what a launch does not read is 0.
struct Numbers {
  int64_t batch, histories, steps, x_rows, y_rows;
  int64_t reverse, time_major, scale_input, keep_side, reset_before;  // 0 or 1
  int64_t padded, rows, tiles_of_8;

  explicit Numbers(const std::vector<int64_t>& values) {
    static_assert(std::is_trivially_copyable_v<Numbers> && sizeof(Numbers) % sizeof(int64_t) == 0);
    if (values.size() * sizeof(int64_t) != sizeof(Numbers))
      throw std::invalid_argument("numbers must have " + std::to_string(sizeof(Numbers) / sizeof(int64_t)) +
                                  " values, got " + std::to_string(values.size()));
    std::memcpy(this, values.data(), sizeof(Numbers));
  }
};

// alpha0, alpha1, beta0, beta1 of equation (9).
void check_coefficients(const std::vector<double>& coefficients) {
  if (coefficients.size() != 4)
    throw std::invalid_argument("coefficients must have 4 values, got " + std::to_string(coefficients.size()));
}

dien::cuda::Rows rows_of(const Maybe& order, const Maybe& lengths, const Maybe& offsets, const Maybe& history,
                         const Maybe& y_start, const Numbers& n) {
  return {read<int64_t>(order),
          read<int64_t>(lengths),
          read<int64_t>(offsets),
          read<int64_t>(history),
          read<int64_t>(y_start),
          n.batch,
          n.histories,
          n.steps,
          n.x_rows,
          n.y_rows,
          int32_t(n.reverse),
          int32_t(n.time_major)};
}

dien::cuda::Cell cell_of(const std::vector<double>& coefficients, const Numbers& n, const Tensor& w_hh) {
  check_coefficients(coefficients);
  return {float(coefficients[0]), float(coefficients[1]), float(coefficients[2]),  float(coefficients[3]),
          int32_t(n.scale_input), int32_t(n.keep_side),   int32_t(n.reset_before), int32_t(w_hh.size(1))};
}

void forward(Maybe order, Maybe lengths, Maybe offsets, Maybe history, Maybe y_start, Tensor projection,
             Maybe attention, Tensor w_hh, Maybe b_ih, Maybe b_hh, Maybe h0, std::vector<int64_t> numbers,
             std::vector<double> coefficients, Maybe w_ih, Maybe streamed, Maybe y, Tensor h_n) {
  const Numbers n(numbers);
  const dien::cuda::Forward p{
      {rows_of(order, lengths, offsets, history, y_start, n), cell_of(coefficients, n, w_hh), read(projection),
       read<float>(attention), read(w_hh), read<float>(b_ih), read<float>(b_hh), read<float>(h0)},
      y ? write(*y) : nullptr,
      write(h_n),
      read(w_ih),
      w_ih ? int32_t(w_ih->size(1)) : 0,
      int32_t(n.tiles_of_8),
      read(streamed),
      0,
      dien::cuda::update_factor(n.keep_side)};
  const torch::stable::accelerator::DeviceGuard guard(h_n.get_device());
  const dien::cuda::Stream stream = current_stream(h_n.get_device());
  const auto launch = h_n.scalar_type() == ScalarType::BFloat16 ? dien::cuda::forward_bf16
                      : h_n.scalar_type() == ScalarType::Half   ? dien::cuda::forward_f16
                                                                : dien::cuda::forward_f32;
  check(launch(p, int(n.padded), int(n.rows), stream), "the recurrence's forward");
}

void backward(Maybe order, Maybe lengths, Maybe offsets, Maybe history, Maybe y_start, Tensor projection,
              Maybe attention, Tensor w_hh, Maybe b_ih, Maybe b_hh, Maybe h0, std::vector<int64_t> numbers,
              std::vector<double> coefficients, Tensor y, Maybe dy, Maybe dh_n, Maybe fragments, Tensor gates,
              Tensor states, Maybe d_attention, Tensor d_bias, Tensor dh0) {
  const Numbers n(numbers);
  const dien::cuda::Backward p{
      {rows_of(order, lengths, offsets, history, y_start, n), cell_of(coefficients, n, w_hh), read(projection),
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
  check(launch(p, int(n.padded), stream), "the recurrence's backward");
}

void sum_rows_of_history(Tensor gates, Tensor dgx, Tensor rows_of_history, Tensor first, Maybe lengths, Maybe offsets,
                         Maybe y_start, std::vector<int64_t> numbers) {
  const dien::cuda::SumRowsOfHistory p{rows_of({}, lengths, offsets, {}, y_start, Numbers(numbers)),
                                       read(gates),
                                       write(dgx),
                                       read<int64_t>(rows_of_history),
                                       read<int64_t>(first),
                                       int32_t(dgx.size(1)),
                                       int32_t(gates.stride(0))};
  const torch::stable::accelerator::DeviceGuard guard(dgx.get_device());
  const auto store = dgx.scalar_type() == ScalarType::BFloat16 ? dien::cuda::Store::bf16
                     : dgx.scalar_type() == ScalarType::Half   ? dien::cuda::Store::f16
                                                               : dien::cuda::Store::f32;
  check(dien::cuda::sum_rows_of_history(p, store, current_stream(dgx.get_device())),
        "the sum over the rows of each history");
}

int64_t driver_version() { return dien::cuda::driver_version(); }

int64_t runtime_version() { return dien::cuda::runtime_version(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dien_kernels, CUDA, m) {
  m.impl("_cuda_recurrence_forward", TORCH_BOX(&forward));
  m.impl("_cuda_recurrence_backward", TORCH_BOX(&backward));
  m.impl("_cuda_recurrence_sum_rows_of_history", TORCH_BOX(&sum_rows_of_history));
}

STABLE_TORCH_LIBRARY_IMPL(dien_kernels, CompositeExplicitAutograd, m) {
  m.impl("_cuda_driver_version", TORCH_BOX(&driver_version));
  m.impl("_cuda_runtime_version", TORCH_BOX(&runtime_version));
}
#endif
