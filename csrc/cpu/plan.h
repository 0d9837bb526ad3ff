// What the plans of all ops share.
#pragma once
#include <algorithm>

#include "isa.h"
#include "memory.h"

namespace dien {

// Waking threads costs microseconds: the same as some hundred thousand multiplications.
inline void limit_threads(Threads& threads, int64_t products) {
  threads.count = products < 200000 ? 1 : std::max(threads.count, 1);
}

// Runs a planned call, whose `workspace` has its sizes and counts.
template <class Call>
void run_kernel(Call& call, const Kernel<Call>& kernel) {
  const Memory memory = allocate(call.workspace, call.threads.count);
  kernel.run(call);
}

}  // namespace dien
