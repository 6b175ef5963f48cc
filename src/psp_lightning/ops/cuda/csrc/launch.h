// What the CUDA files offer to bindings.cpp. No header of PyTorch is needed on this side: quick to compile, and the
// kernels depend on no version of it.
#pragma once
#include <cuda_runtime_api.h>

#include <initializer_list>

#include "upfirdn2d.h"

namespace psp {

// `last`: channels are fastest in memory. All return the launch's error code; nothing waits for the device.
cudaError_t launch_epilogue(const Epilogue& a, Kind kind, bool last, cudaStream_t stream);
cudaError_t launch_epilogue_backward(const EpilogueBackward& a, Kind kind, bool last, cudaStream_t stream);
cudaError_t launch_blur(const Blur& a, Kind kind, bool last, cudaStream_t stream);
cudaError_t launch_upfirdn(const Upfirdn& a, Kind kind, bool last, cudaStream_t stream);

// Second to last size of `EpilogueBackward::partials`.
int64_t backward_chunks(const EpilogueBackward& a, Kind kind, bool last);

// The widest pack of `kind` that fits: all addresses are multiples of 16 bytes, and `length` (pixels of a plane, or
// channels where these are last) is a multiple of the pack.
inline bool packs_fit(Kind kind, int64_t length, std::initializer_list<const void*> addresses) {
  const int width = kind == Kind::f64 ? 2 : kind == Kind::f32 ? 4 : 8;
  for (const void* address : addresses)
    if (reinterpret_cast<uintptr_t>(address) % 16) return false;
  return length % width == 0;
}

}  // namespace psp
