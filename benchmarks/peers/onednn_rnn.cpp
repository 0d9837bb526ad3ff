// oneDNN's lbr_gru and lbr_augru over one batch, behind four C functions. Float32, time-major, no lengths:
//
//   x [T, B, I]   a [T, B, 1]   w_layer [I, 3, H]   w_iter [H, 3, H]   bias [4, H]   y [T, B, H]
//
// with the gates in oneDNN's order (update, reset, candidate). The states before the first step are zeros.
// In inference the weights are brought into the layout that the primitive asks for once, by rnn_set_weights; in training
// they change with every step, so rnn_forward and rnn_backward do it in each call.

#include <oneapi/dnnl/dnnl.hpp>
#include <tbb/global_control.h>

#include <cstddef>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <unordered_map>

namespace {

using dnnl::memory;
using tag = memory::format_tag;
using Arguments = std::unordered_map<int, memory>;

constexpr auto kDirection = dnnl::rnn_direction::unidirectional_left2right;

memory::desc f32(const memory::dims& dims, tag layout) { return {dims, memory::data_type::f32, layout}; }

struct Rnn {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  bool training;
  memory::desc x, a, w_layer, w_iter, bias, y, none;
  dnnl::primitive forward, backward;
  Arguments args, back_args;
  // As the caller has them, and as each of the two primitives wants them.
  memory w_layer_plain, w_iter_plain, w_layer_forward, w_iter_forward, w_layer_backward, w_iter_backward;

  Rnn(bool attentive, bool trains, memory::dim T, memory::dim B, memory::dim I, memory::dim H)
      : training(trains),
        x(f32({T, B, I}, tag::tnc)),
        a(f32({T, B, 1}, tag::tnc)),
        w_layer(f32({1, 1, I, 3, H}, tag::ldigo)),
        w_iter(f32({1, 1, H, 3, H}, tag::ldigo)),
        bias(f32({1, 1, 4, H}, tag::ldgo)),
        y(f32({T, B, H}, tag::tnc)) {
    const auto layer_any = f32({1, 1, I, 3, H}, tag::any), iter_any = f32({1, 1, H, 3, H}, tag::any);
    const auto kind = trains ? dnnl::prop_kind::forward_training : dnnl::prop_kind::forward_inference;
    const auto back = dnnl::prop_kind::backward;
    if (attentive) {
      const dnnl::lbr_augru_forward::primitive_desc hint(engine, kind, kDirection, x, none, a, layer_any, iter_any,
                                                         bias, y, none);
      set_forward<dnnl::lbr_augru_forward>(hint);
      if (trains) {
        set_backward<dnnl::lbr_augru_backward>(
            dnnl::lbr_augru_backward::primitive_desc(engine, back, kDirection, x, none, a, layer_any, iter_any, bias, y,
                                                     none, x, none, a, w_layer, w_iter, bias, y, none, hint));
      }
    } else {
      const dnnl::lbr_gru_forward::primitive_desc hint(engine, kind, kDirection, x, none, layer_any, iter_any, bias, y,
                                                       none);
      set_forward<dnnl::lbr_gru_forward>(hint);
      if (trains) {
        set_backward<dnnl::lbr_gru_backward>(
            dnnl::lbr_gru_backward::primitive_desc(engine, back, kDirection, x, none, layer_any, iter_any, bias, y,
                                                   none, x, none, w_layer, w_iter, bias, y, none, hint));
      }
    }
    w_layer_plain = memory(w_layer, engine, nullptr);
    w_iter_plain = memory(w_iter, engine, nullptr);
    add(args, DNNL_ARG_SRC_LAYER, x);
    add(args, DNNL_ARG_BIAS, bias);
    add(args, DNNL_ARG_DST_LAYER, y);
    if (attentive) add(args, DNNL_ARG_AUGRU_ATTENTION, a);
    if (!trains) return;
    for (const auto& [name, argument] : args) {
      if (name != DNNL_ARG_WEIGHTS_LAYER && name != DNNL_ARG_WEIGHTS_ITER) back_args[name] = argument;
    }
    add(back_args, DNNL_ARG_DIFF_SRC_LAYER, x);
    add(back_args, DNNL_ARG_DIFF_WEIGHTS_LAYER, w_layer);
    add(back_args, DNNL_ARG_DIFF_WEIGHTS_ITER, w_iter);
    add(back_args, DNNL_ARG_DIFF_BIAS, bias);
    add(back_args, DNNL_ARG_DIFF_DST_LAYER, y);
    if (attentive) add(back_args, DNNL_ARG_DIFF_AUGRU_ATTENTION, a);
  }

  void add(Arguments& to, int name, const memory::desc& desc) { to[name] = memory(desc, engine, nullptr); }

  template <typename Primitive>
  void set_forward(const typename Primitive::primitive_desc& desc) {
    forward = Primitive(desc);
    w_layer_forward = memory(desc.weights_layer_desc(), engine);
    w_iter_forward = memory(desc.weights_iter_desc(), engine);
    args[DNNL_ARG_WEIGHTS_LAYER] = w_layer_forward;
    args[DNNL_ARG_WEIGHTS_ITER] = w_iter_forward;
    if (training) args[DNNL_ARG_WORKSPACE] = memory(desc.workspace_desc(), engine);
  }

  template <typename Primitive>
  void set_backward(const typename Primitive::primitive_desc& desc) {
    backward = Primitive(desc);
    w_layer_backward = memory(desc.weights_layer_desc(), engine);
    w_iter_backward = memory(desc.weights_iter_desc(), engine);
    back_args[DNNL_ARG_WEIGHTS_LAYER] = w_layer_backward;
    back_args[DNNL_ARG_WEIGHTS_ITER] = w_iter_backward;
  }

  // Brings weights into the layout of ``to``, if it is another.
  void bring(memory& from, memory& to) {
    if (from.get_desc() == to.get_desc()) {
      to.set_data_handle(from.get_data_handle());
    } else {
      dnnl::reorder(from, to).execute(stream, from, to);
    }
  }

  static void point(Arguments& at, int name, float* data) {
    if (at.count(name)) at[name].set_data_handle(data);
  }
};

template <typename Action>
int guarded(Action action) {
  try {
    action();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "oneDNN: %s\n", error.what());
    return 1;
  }
}

}  // namespace

extern "C" {

// At most so many threads in the whole process's TBB, until the next call.
int rnn_set_threads(int threads) {
  static std::unique_ptr<tbb::global_control> limit;
  return guarded([&] {
    limit.reset();
    limit.reset(new tbb::global_control(tbb::global_control::max_allowed_parallelism, threads));
  });
}

void* rnn_create(int attentive, int training, long T, long B, long I, long H) {
  Rnn* made = nullptr;
  guarded([&] { made = new Rnn(attentive != 0, training != 0, T, B, I, H); });
  return made;
}

void rnn_destroy(void* handle) { delete static_cast<Rnn*>(handle); }

int rnn_set_weights(void* handle, float* w_layer, float* w_iter) {
  return guarded([&] {
    Rnn& rnn = *static_cast<Rnn*>(handle);
    rnn.w_layer_plain.set_data_handle(w_layer);
    rnn.w_iter_plain.set_data_handle(w_iter);
    rnn.bring(rnn.w_layer_plain, rnn.w_layer_forward);
    rnn.bring(rnn.w_iter_plain, rnn.w_iter_forward);
    rnn.stream.wait();
  });
}

int rnn_forward(void* handle, float* x, float* a, float* w_layer, float* w_iter, float* bias, float* y) {
  return guarded([&] {
    Rnn& rnn = *static_cast<Rnn*>(handle);
    if (rnn.training) {
      rnn.w_layer_plain.set_data_handle(w_layer);
      rnn.w_iter_plain.set_data_handle(w_iter);
      rnn.bring(rnn.w_layer_plain, rnn.w_layer_forward);
      rnn.bring(rnn.w_iter_plain, rnn.w_iter_forward);
    }
    Rnn::point(rnn.args, DNNL_ARG_SRC_LAYER, x);
    Rnn::point(rnn.args, DNNL_ARG_AUGRU_ATTENTION, a);
    Rnn::point(rnn.args, DNNL_ARG_BIAS, bias);
    Rnn::point(rnn.args, DNNL_ARG_DST_LAYER, y);
    rnn.forward.execute(rnn.stream, rnn.args);
    rnn.stream.wait();
  });
}

// After rnn_forward with the same tensors, whose handles are still set. The gradients of the weights are added to what
// is there, so they are zeroed first.
int rnn_backward(void* handle, float* dy, float* dx, float* da, float* dw_layer, float* dw_iter, float* dbias) {
  return guarded([&] {
    Rnn& rnn = *static_cast<Rnn*>(handle);
    rnn.bring(rnn.w_layer_plain, rnn.w_layer_backward);
    rnn.bring(rnn.w_iter_plain, rnn.w_iter_backward);
    std::memset(dw_layer, 0, rnn.w_layer.get_size());
    std::memset(dw_iter, 0, rnn.w_iter.get_size());
    std::memset(dbias, 0, rnn.bias.get_size());
    Rnn::point(rnn.back_args, DNNL_ARG_DIFF_DST_LAYER, dy);
    Rnn::point(rnn.back_args, DNNL_ARG_DIFF_SRC_LAYER, dx);
    Rnn::point(rnn.back_args, DNNL_ARG_DIFF_AUGRU_ATTENTION, da);
    Rnn::point(rnn.back_args, DNNL_ARG_DIFF_WEIGHTS_LAYER, dw_layer);
    Rnn::point(rnn.back_args, DNNL_ARG_DIFF_WEIGHTS_ITER, dw_iter);
    Rnn::point(rnn.back_args, DNNL_ARG_DIFF_BIAS, dbias);
    rnn.backward.execute(rnn.stream, rnn.back_args);
    rnn.stream.wait();
  });
}

}  // extern "C"
