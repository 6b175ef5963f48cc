// The epilogue after a separable 4x4 FIR filter, in one pass. Without its other parts it is only the filter.
#include "dispatch.cuh"

namespace psp {
namespace {

template <typename T, int V, bool LAST>
__global__ void __launch_bounds__(256, 3) fir_epilogue(const FirEpilogue f, const RowTiling t) {
  fir_epilogue_thread<T, V, LAST>(f, t, blockIdx.x, threadIdx.x);
}

template <typename T, int V, bool LAST> cudaError_t run(const FirEpilogue& f, cudaStream_t stream) {
  const RowTiling t = make_row_tiling(f.e.n, f.e.c, f.out_h, f.out_w, V, LAST, strip_rows(f.out_h));
  if (too_many(t.blocks)) return cudaErrorInvalidConfiguration;
  fir_epilogue<T, V, LAST><<<static_cast<unsigned>(t.blocks), t.threads, 0, stream>>>(f, t);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_fir_epilogue(const FirEpilogue& f, Kind kind, bool last, cudaStream_t stream) {
  const bool fit = last && packs_fit(kind, f.e.c, {f.e.x, f.e.out});
  return with_type(kind, [&](auto value) {
    using T = decltype(value);
    if (fit) return run<T, 16 / sizeof(T), true>(f, stream);
    return last ? run<T, 1, true>(f, stream) : run<T, 1, false>(f, stream);
  });
}

}  // namespace psp
