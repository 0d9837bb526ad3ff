// Attention scores on the CPU as their callers see them: raw pointers in, raw pointers out.
#pragma once
#include "attention_params.h"
#include "layout.h"

namespace dien {

// A mask [histories, steps], or data null.
struct Mask {
  const bool* data;
  int64_t s0, s1;
};

// Throws std::invalid_argument for index values that would leave the arrays, before any result is made.
void check_attention(const Layout& layout, int64_t histories, int64_t steps, int64_t batch);

// The caller has called check_attention and fills the call's sizes, options, arrays, layers, results and threads.
// Array strides: target s0 row, s1 feature; states s0 history, s1 step, s2 unit (jagged: s1, s2); da s0 row, s1 step
// (jagged: s1).
void attention(AttentionCall call, const Layout& layout, const Mask& mask, int64_t steps);

}  // namespace dien
