// Turns the dtype, known at run time, into a template argument.
#pragma once
#include <cuda_runtime.h>

#include "launch.h"

namespace psp {

// Calls `body` with a value of the type that `kind` names; the body recovers the type with decltype.
template <typename Body> cudaError_t with_type(Kind kind, Body body) {
  switch (kind) {
    case Kind::f32: return body(float());
    case Kind::f64: return body(double());
    case Kind::f16: return body(__half());
    case Kind::bf16: return body(__nv_bfloat16());
  }
  return cudaErrorInvalidValue;
}

inline bool too_many(int64_t blocks) { return blocks > 2147483647; }

}  // namespace psp
