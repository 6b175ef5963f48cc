// The interface of the CUDA files for bindings.cpp. It needs no PyTorch header, so the files compile quickly, and the
// kernels do not depend on a PyTorch version.
#pragma once
#include <cuda_runtime_api.h>

#include <initializer_list>

#include "upfirdn2d.h"

namespace psp {

// `last`: channels are fastest in memory. All return the error code of the launch; none waits for the device.
cudaError_t launch_epilogue(const Epilogue& a, Kind kind, bool last, cudaStream_t stream);
cudaError_t launch_epilogue_backward(const EpilogueBackward& a, Kind kind, bool last, cudaStream_t stream);
cudaError_t launch_fir_epilogue(const FirEpilogue& a, Kind kind, bool last, cudaStream_t stream);
cudaError_t launch_upfirdn(const Upfirdn& a, Kind kind, bool last, cudaStream_t stream);

// The second to last size of `EpilogueBackward::partials`.
int64_t backward_chunks(const EpilogueBackward& a, Kind kind, bool last);

// Whether 16-byte packs of `kind` fit: all addresses are multiples of 16 bytes, and `length` (the pixels of a plane, or
// the channels if these are last) is a multiple of the pack.
inline bool packs_fit(Kind kind, int64_t length, std::initializer_list<const void*> addresses) {
  const int width = kind == Kind::f64 ? 2 : kind == Kind::f32 ? 4 : 8;
  for (const void* address : addresses)
    if (reinterpret_cast<uintptr_t>(address) % 16) return false;
  return length % width == 0;
}

}  // namespace psp
