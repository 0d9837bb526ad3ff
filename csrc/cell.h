// One step of the recurrence and its derivative, once, for CPU SIMD lanes and CUDA threads alike.
//
// Equations (7), (8), (11) to (13) and (15) of docs/math.md on a lane type V that has +, -, * and a scalar broadcast.
// The update gate is on the candidate side here: callers store keep-side weights negated.
// No include guard and no include: each instruction set includes this file inside its own namespace, so that the
// linker can never pick a copy compiled for a wider machine. DIEN_INLINE is the includer's "always inline".

// (7), (8): the state moves towards the candidate by g = alpha + beta u.
template <class V, class S>
DIEN_INLINE V next_state(V h, V u, V n, S alpha, S beta) {
  return h + (alpha + beta * u) * (n - h);
}

template <class V>
struct StepGradient {
  V an, au;  // of the pre-activations of n and u
  V dg;      // of g
  V dh;      // the part of dh that passes straight through: dh (1 - g)
};

// (11), (12), (13): everything that does not pass through the reset gate.
template <class V, class S>
DIEN_INLINE StepGradient<V> step_gradient(V dh, V h, V u, V n, S alpha, S beta) {
  const V g = alpha + beta * u;
  const V move = dh * g;
  StepGradient<V> d;
  d.dg = dh * (n - h);
  d.an = move * (S(1) - n * n);
  d.au = beta * d.dg * (u * (S(1) - u));
  d.dh = dh - move;
  return d;
}

// (15): through the reset gate, given the gradient of r.
template <class V>
DIEN_INLINE V reset_gradient(V dr, V r) {
  return dr * (r - r * r);
}
