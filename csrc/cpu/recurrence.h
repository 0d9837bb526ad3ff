// The CPU recurrence as its callers see it: raw pointers in, raw pointers out.
#pragma once
#include "params.h"

namespace dien {

// How rows lie in memory, on top of the arrays of Job; contiguous int64, null where absent.
struct Layout {
  const int64_t *lengths, *offsets, *history;
  int64_t x_rows;          // N of a jagged batch
  int64_t attention_rows;  // steps of all rows, where attention is jagged; else -1
  bool reverse;
};

// The caller fills Job's sizes, cell, arrays, results and threads; these plan rows and working memory, and run.
// Array strides: x s0 history, s1 step, s2 feature (jagged: s1, s2); attention s0 row, s1 step (jagged: s1);
// dy s0 row, s1 step, s2 unit (jagged: s1, s2); matrices s0, s1; vectors s0.
// Throw std::invalid_argument for index values that would leave the arrays.
void recurrence_forward(Job job, const Layout& layout);
void recurrence_backward(Job job, const Layout& layout);

}  // namespace dien
