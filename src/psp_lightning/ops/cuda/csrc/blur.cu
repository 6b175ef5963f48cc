// The epilogue behind a separable 4x4 filter, in one pass; without its other parts it is that filter alone.
#include "dispatch.cuh"

namespace psp {
namespace {

template <typename T, int V, int S, bool LAST>
__global__ void __launch_bounds__(256) blur(const Blur b, const RowTiling t) {
  blur_thread<T, V, S, LAST>(b, t, blockIdx.x, threadIdx.x);
}

template <typename T, int V, int S, bool LAST> cudaError_t run(const Blur& b, cudaStream_t stream) {
  const RowTiling t = make_row_tiling(b.e.n, b.e.c, b.out_h, b.out_w, V, LAST, S);
  if (too_many(t.blocks)) return cudaErrorInvalidConfiguration;
  blur<T, V, S, LAST><<<static_cast<unsigned>(t.blocks), t.threads, 0, stream>>>(b, t);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_blur(const Blur& b, Kind kind, bool last, cudaStream_t stream) {
  const bool fit = last && packs_fit(kind, b.e.c, {b.e.x, b.e.out});
  return with_type(kind, [&](auto value) {
    using T = decltype(value);
    if (fit) return run<T, 16 / sizeof(T), ROWS_OF_PACKS, true>(b, stream);
    return last ? run<T, 1, ROWS, true>(b, stream) : run<T, 1, ROWS, false>(b, stream);
  });
}

}  // namespace psp
