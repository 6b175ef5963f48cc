// The kernels on the CPU: the code of csrc/ for one thread is called for one thread after another. Only the parts that
// need a GPU are missing: launches, shared memory, and threads that run at the same time.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "types.h"

namespace psp {
inline float widen(c10::Half x) { return static_cast<float>(x); }
inline float widen(c10::BFloat16 x) { return static_cast<float>(x); }
template <> inline c10::Half narrow<c10::Half>(float x) { return c10::Half(x); }
template <> inline c10::BFloat16 narrow<c10::BFloat16>(float x) { return c10::BFloat16(x); }
}  // namespace psp

#include "launch.h"

namespace psp {
namespace {

template <typename Body> void with_type(Kind kind, Body body) {
  switch (kind) {
    case Kind::f32: return body(float());
    case Kind::f64: return body(double());
    case Kind::f16: return body(c10::Half());
    case Kind::bf16: return body(c10::BFloat16());
  }
}

template <typename Body> void each(int64_t blocks, int threads, Body body) {
  for (int64_t block = 0; block < blocks; ++block)
    for (int thread = 0; thread < threads; ++thread) body(static_cast<uint32_t>(block), thread);
}

template <typename T, int V, bool LAST> void run(const Epilogue& a) {
  const Tiling t = make_tiling<V, LAST>(a.n, a.c, a.pixels, ROUNDS);
  each(t.blocks, t.tx * t.ty, [&](uint32_t b, int i) { epilogue_thread<T, V, LAST>(a, t, b, i); });
}

template <typename T, int V, bool LAST> void run(const EpilogueBackward& a) {
  using A = Wide<T>;
  constexpr int N = (LAST ? V : 1) * 3;
  const Tiling t = make_tiling<V, LAST>(a.n, a.c, a.pixels, ROUNDS_BACKWARD);
  for (uint32_t block = 0; block < t.blocks; ++block)
    for (int column = 0; column < t.tx; ++column) {
      A sums[N] = {};
      for (int row = 0; row < t.ty; ++row)
        epilogue_backward_thread<T, V, LAST>(a, t, block, row * t.tx + column, sums);
      const Place at = find_place<V, LAST>(t, a.c, a.pixels, block, column);
      if (a.partials && at.valid)
        for (int k = 0; k < N; ++k)
          static_cast<A*>(a.partials)[partial_index(t, a.c, at, k / 3) + k % 3] = sums[k];
    }
}

template <typename T, int V, bool LAST> void run(const FirEpilogue& f) {
  const RowTiling t = make_row_tiling(f.e.n, f.e.c, f.out_h, f.out_w, V, LAST, strip_rows(f.out_h));
  each(t.blocks, t.threads, [&](uint32_t block, int i) { fir_epilogue_thread<T, V, LAST>(f, t, block, i); });
}

template <typename T, int V, bool LAST> void run(const Upfirdn& a) {
  const RowTiling t = make_row_tiling(a.n, a.c, a.out_h, a.out_w, V, LAST, 1);
  each(t.blocks, t.threads, [&](uint32_t block, int i) { upfirdn_thread<T, V, LAST>(a, t, block, i); });
}

bool fits(const EpilogueBackward& a, Kind kind, bool last) {
  return packs_fit(kind, last ? a.c : a.pixels, {a.dy, a.y, a.x, a.g});
}

template <typename Args> cudaError_t launch(const Args& a, Kind kind, bool last, bool fit) {
  with_type(kind, [&](auto value) {
    using T = decltype(value);
    constexpr int V = 16 / sizeof(T);
    if (last) fit ? run<T, V, true>(a) : run<T, 1, true>(a);
    else fit ? run<T, V, false>(a) : run<T, 1, false>(a);
  });
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_epilogue(const Epilogue& a, Kind kind, bool last, cudaStream_t) {
  return launch(a, kind, last, packs_fit(kind, last ? a.c : a.pixels, {a.x, a.out}));
}

cudaError_t launch_epilogue_backward(const EpilogueBackward& a, Kind kind, bool last, cudaStream_t) {
  return launch(a, kind, last, fits(a, kind, last));
}

int64_t backward_chunks(const EpilogueBackward& a, Kind kind, bool last) {
  const bool fit = fits(a, kind, last);
  int64_t chunks = 0;
  with_type(kind, [&](auto value) {
    constexpr int V = 16 / sizeof(value);
    const auto count = [&](auto tiling) { return tiling(a.n, a.c, a.pixels, ROUNDS_BACKWARD).chunks; };
    if (last) chunks = fit ? count(make_tiling<V, true>) : count(make_tiling<1, true>);
    else chunks = fit ? count(make_tiling<V, false>) : count(make_tiling<1, false>);
  });
  return chunks;
}

cudaError_t launch_fir_epilogue(const FirEpilogue& f, Kind kind, bool last, cudaStream_t) {
  const bool fit = last && packs_fit(kind, f.e.c, {f.e.x, f.e.out});
  with_type(kind, [&](auto value) {
    using T = decltype(value);
    if (fit) run<T, 16 / sizeof(T), true>(f);
    else last ? run<T, 1, true>(f) : run<T, 1, false>(f);
  });
  return cudaSuccess;
}

cudaError_t launch_upfirdn(const Upfirdn& a, Kind kind, bool last, cudaStream_t) {
  const bool fit = last && packs_fit(kind, a.c, {a.x, a.out});
  with_type(kind, [&](auto value) {
    using T = decltype(value);
    if (fit) run<T, 16 / sizeof(T), true>(a);
    else last ? run<T, 1, true>(a) : run<T, 1, false>(a);
  });
  return cudaSuccess;
}

}  // namespace psp
