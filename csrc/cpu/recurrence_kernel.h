// A call of the recurrence: its weights are packed, shared histories are projected, and the tasks of the forward or of the
// backward run. Included inside an instruction set's namespace.

template <class L>
struct Recurrence {
  using T = typename L::Scalar;

  static Sizes sizes(const RecurrenceCall& call) {
    const Shape<L> s(call);
    const int64_t scratch = call.backward   ? bytes_of<typename Backward<L>::Scratch>(call, s)
                            : call.unpacked ? bytes_of<typename Unpacked<L>::Scratch>(s)
                                            : bytes_of<typename Forward<L>::Scratch>(call, s);
    const int64_t sums = call.backward ? bytes_of<typename Backward<L>::Sums>(s) : 0;
    return {bytes_of<Weights<L>>(call, s), sums, scratch, 3 * s.Hp * int64_t(sizeof(T))};
  }

  static void run(const RecurrenceCall& call) {
    const Shape<L> s(call);
    Arena packed{call.workspace.packed};
    const Weights<L> weights(call, s, packed);
    weights.fill(call, s);
    if (call.unpacked) return Unpacked<L>{call, s, weights}.run(call.workspace.scratch);
    if (projects(call)) project_histories(call, s, weights);
    if (call.backward) return backward({call, s, weights});
    const Forward<L> kernel{call, s, weights};
    run_tasks(call, block_count(call), [&](char* scratch, int64_t i) { kernel.run_block(scratch, i); });
  }

 private:
  static void backward(const Backward<L>& kernel) {
    const RecurrenceCall& call = kernel.call;
    const int64_t groups = call.workspace.groups;
    run_tasks(call, groups, [&](char* scratch, int64_t g) { kernel.run_group(scratch, g); });
    if (call.shared) run_tasks(call, groups, [&](char* scratch, int64_t g) { kernel.run_history_group(scratch, g); });
    run_tasks(call, 3 * call.hidden, [&](char* scratch, int64_t row) { kernel.reduce_row(row, scratch); });
  }

  static void project_histories(const RecurrenceCall& call, const Shape<L>& s, const Weights<L>& weights) {
    T* projection = reinterpret_cast<T*>(call.workspace.projection);
    run_tasks(call, call.histories, [&](char* memory, int64_t u) {
      Arena scratch{memory};
      T* xs = scratch.take<T>(call.chunk_tokens * s.Ip);
      if (is_read(call, u)) project_history<L>(call, s, weights, call.history_rows[u], xs, projection);
    });
  }
};
