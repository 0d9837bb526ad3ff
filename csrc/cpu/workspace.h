// A call's working memory as the kernels use it, and the tasks that do so. Included inside an instruction set's namespace.

#include "arena.h"

// The bytes that a struct of arrays takes from an arena.
template <class Arrays, class... Arguments>
int64_t bytes_of(const Arguments&... arguments) {
  Arena arena{nullptr};
  Arrays(arguments..., arena);
  return arena.used;
}

// Where the gradient sums of a group begin.
inline char* sums_of(const Workspace& workspace, int64_t group) {
  return workspace.sums + group * workspace.sizes.sums;
}

// out[..n) = the sum over the groups, in order, of what stands at `first` in the sums of the first group.
template <class T>
DIEN_NOINLINE void sum_groups(const Workspace& workspace, const T* first, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = 0;
  for (int64_t g = 0; g < workspace.groups; ++g) {
    const T* in = reinterpret_cast<const T*>(reinterpret_cast<const char*>(first) + g * workspace.sizes.sums);
    for (int64_t i = 0; i < n; ++i) out[i] += in[i];
  }
}

// Runs task(thread's scratch, index) for index < n over the threads, in order of index, from one counter.
template <class Call, class F>
void run_tasks(const Call& call, int64_t n, const F& task) {
  struct Context {
    char* memory;
    int64_t memory_bytes, n, next;
    const F* task;
  } context{call.workspace.scratch, call.workspace.sizes.scratch, n, 0, &task};
  const int64_t threads = call.threads.count < n ? call.threads.count : n;
  auto worker = [](void* p, int64_t thread) {
    Context& c = *static_cast<Context*>(p);
    char* scratch = c.memory + thread * c.memory_bytes;
    for (int64_t i; (i = __atomic_fetch_add(&c.next, int64_t(1), __ATOMIC_RELAXED)) < c.n;) (*c.task)(scratch, i);
  };
  if (threads <= 1)
    worker(&context, 0);
  else
    call.threads.run(threads, &context, worker);
}
