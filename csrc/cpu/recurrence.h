// The CPU recurrence as its callers see it: raw pointers in, raw pointers out.
#pragma once
#include "layout.h"
#include "recurrence_params.h"

namespace dien {

// The caller fills the call's sizes, cell, arrays, results and threads; these plan rows and working memory, and run.
// Array strides: x s0 history, s1 step, s2 feature (jagged: s1, s2); attention s0 row, s1 step (jagged: s1);
// dy s0 row, s1 step, s2 unit (jagged: s1, s2); matrices s0, s1; vectors s0.
// Throw std::invalid_argument for index values that would leave the arrays.
void recurrence_forward(RecurrenceCall call, const Layout& layout);
void recurrence_backward(RecurrenceCall call, const Layout& layout);

}  // namespace dien
