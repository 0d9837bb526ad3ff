// What every CPU kernel is told: plain data, no torch, no C++ library. Shared by every instruction set, and so without
// functions that the linker could take from the wrong one.
#pragma once
#include <cstdint>

namespace dien {

enum class Store : int { f32, f64, bf16 };

// A tensor as pointer and element strides; data is null where an optional tensor is absent.
struct Array {
  void* data;
  int64_t s0, s1, s2;
  Store store;
};

struct Threads {
  int count;
  void (*run)(int64_t tasks, void* context, void (*task)(void* context, int64_t index));
};

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// What an instruction set's kernel asks of a call's working memory, in bytes.
struct Sizes {
  int64_t packed;          // the weights, in the orders in which the loops read them
  int64_t sums;            // the gradient sums of one group
  int64_t scratch;         // what one thread works in
  int64_t projection_row;  // recurrence: W_ih x of one step of a shared history, or the gradient of it
};

// The working memory of a call. The plan fills the numbers, `allocate` of memory.h the addresses, and the kernels take
// typed pieces from each part with an Arena (arena.h).
struct Workspace {
  Sizes sizes;
  int64_t groups;           // fixed sets of tasks; each adds its gradients up before the groups are added, in order
  int64_t projection_rows;  // recurrence with shared histories: steps of all histories,
  int64_t gradient_rows;    // and in the backward the steps of all rows
  char *packed, *sums, *projection, *shared_gradient, *scratch;
};

}  // namespace dien
