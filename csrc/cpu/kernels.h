// Gathers the pieces of one instruction set: included once by each isa_*.cpp, inside its namespace.

#include "../cell.h"
#include "simd.h"
#include "workspace.h"
#include "row_io.h"
#include "gemm.h"
#include "pack.h"
#include "block.h"
#include "recurrence_fwd.h"
#include "recurrence_unpacked.h"
#include "recurrence_bwd.h"
#include "recurrence_kernel.h"
#include "mlp.h"
#include "attention_kernel.h"
#include "auxiliary_loss_kernel.h"

template <class T, int N>
constexpr Kernels kernels_of() {
  using L = Lanes<T, N>;
  return {N,
          {&Recurrence<L>::sizes, &Recurrence<L>::run},
          {&Attention<L>::sizes, &Attention<L>::run},
          {&AuxiliaryLoss<L>::sizes, &AuxiliaryLoss<L>::run}};
}
