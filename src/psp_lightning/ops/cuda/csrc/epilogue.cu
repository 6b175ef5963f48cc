// Demodulation, noise, bias, leaky ReLU, gain and clamp in one pass; the gradient and its sums in another.
#include "dispatch.cuh"

namespace psp {
namespace {

template <typename T, int V, bool LAST>
__global__ void __launch_bounds__(256) epilogue(const Epilogue a, const Tiling t) {
  epilogue_thread<T, V, LAST>(a, t, blockIdx.x, threadIdx.x);
}

template <typename T, int V, bool LAST>
__global__ void __launch_bounds__(256) epilogue_backward(const EpilogueBackward a, const Tiling t) {
  using A = Wide<T>;
  constexpr int N = (LAST ? V : 1) * 3;
  A sums[N];
  for (int k = 0; k < N; ++k) sums[k] = 0;
  epilogue_backward_thread<T, V, LAST>(a, t, blockIdx.x, threadIdx.x, sums);
  if (!a.partials) return;  // all threads take the same branch

  // Threads of one column (equal thread % tx) have the same channels. Their rows are reduced by a tree in a fixed
  // order, so equal inputs give equal bits.
  extern __shared__ __align__(16) unsigned char memory[];
  A* shared = reinterpret_cast<A*>(memory);  // (ty, tx, N)
  const int thread = threadIdx.x, row = thread / t.tx;
  for (int k = 0; k < N; ++k) shared[thread * N + k] = sums[k];
  for (int half = t.ty / 2; half > 0; half /= 2) {
    __syncthreads();
    if (row < half)
      for (int k = 0; k < N; ++k) shared[thread * N + k] += shared[(thread + half * t.tx) * N + k];
  }
  const Place at = find_place<V, LAST>(t, a.c, a.pixels, blockIdx.x, thread);
  if (row == 0 && at.valid)
    for (int k = 0; k < N; ++k)  // a thread of row 0 made the last write to these itself
      static_cast<A*>(a.partials)[partial_index(t, a.c, at, k / 3) + k % 3] = shared[thread * N + k];
}

template <typename T, int V, bool LAST> cudaError_t run(const Epilogue& a, cudaStream_t stream) {
  const Tiling t = make_tiling<V, LAST>(a.n, a.c, a.pixels, ROUNDS);
  if (too_many(t.blocks)) return cudaErrorInvalidConfiguration;
  epilogue<T, V, LAST><<<static_cast<unsigned>(t.blocks), t.tx * t.ty, 0, stream>>>(a, t);
  return cudaGetLastError();
}

template <typename T, int V, bool LAST> cudaError_t run(const EpilogueBackward& a, cudaStream_t stream) {
  const Tiling t = make_tiling<V, LAST>(a.n, a.c, a.pixels, ROUNDS_BACKWARD);
  if (too_many(t.blocks)) return cudaErrorInvalidConfiguration;
  const size_t memory = a.partials ? sizeof(Wide<T>) * t.tx * t.ty * (LAST ? V : 1) * 3 : 0;  // at most 24 KiB
  epilogue_backward<T, V, LAST><<<static_cast<unsigned>(t.blocks), t.tx * t.ty, memory, stream>>>(a, t);
  return cudaGetLastError();
}

bool fits(const EpilogueBackward& a, Kind kind, bool last) {
  return packs_fit(kind, last ? a.c : a.pixels, {a.dy, a.y, a.x, a.g});
}

template <typename Args> cudaError_t launch(const Args& a, Kind kind, bool last, bool fit, cudaStream_t stream) {
  return with_type(kind, [&](auto value) {
    using T = decltype(value);
    constexpr int V = 16 / sizeof(T);
    if (last) return fit ? run<T, V, true>(a, stream) : run<T, 1, true>(a, stream);
    return fit ? run<T, V, false>(a, stream) : run<T, 1, false>(a, stream);
  });
}

}  // namespace

cudaError_t launch_epilogue(const Epilogue& a, Kind kind, bool last, cudaStream_t stream) {
  return launch(a, kind, last, packs_fit(kind, last ? a.c : a.pixels, {a.x, a.out}), stream);
}

cudaError_t launch_epilogue_backward(const EpilogueBackward& a, Kind kind, bool last, cudaStream_t stream) {
  return launch(a, kind, last, fits(a, kind, last), stream);
}

int64_t backward_chunks(const EpilogueBackward& a, Kind kind, bool last) {
  const bool fit = fits(a, kind, last);
  int64_t chunks = 0;
  with_type(kind, [&](auto value) {
    constexpr int V = 16 / sizeof(value);
    const auto count = [&](auto tiling) { return tiling(a.n, a.c, a.pixels, ROUNDS_BACKWARD).chunks; };
    if (last) chunks = fit ? count(make_tiling<V, true>) : count(make_tiling<1, true>);
    else chunks = fit ? count(make_tiling<V, false>) : count(make_tiling<1, false>);
    return cudaSuccess;
  });
  return chunks;
}

}  // namespace psp
