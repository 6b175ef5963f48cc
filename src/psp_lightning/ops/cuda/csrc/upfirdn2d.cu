// upfirdn2d with any factors, padding and FIR filter.
#include "dispatch.cuh"

namespace psp {
namespace {

template <typename T, int V, bool LAST>
__global__ void __launch_bounds__(256) upfirdn(const Upfirdn a, const RowTiling t) {
  upfirdn_thread<T, V, LAST>(a, t, blockIdx.x, threadIdx.x);
}

template <typename T, int V, bool LAST> cudaError_t run(const Upfirdn& a, cudaStream_t stream) {
  const RowTiling t = make_row_tiling(a.n, a.c, a.out_h, a.out_w, V, LAST, 1);
  if (too_many(t.blocks)) return cudaErrorInvalidConfiguration;
  upfirdn<T, V, LAST><<<static_cast<unsigned>(t.blocks), t.threads, 0, stream>>>(a, t);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_upfirdn(const Upfirdn& a, Kind kind, bool last, cudaStream_t stream) {
  const bool fit = last && packs_fit(kind, a.c, {a.x, a.out});
  return with_type(kind, [&](auto value) {
    using T = decltype(value);
    if (fit) return run<T, 16 / sizeof(T), true>(a, stream);
    return last ? run<T, 1, true>(a, stream) : run<T, 1, false>(a, stream);
  });
}

}  // namespace psp
