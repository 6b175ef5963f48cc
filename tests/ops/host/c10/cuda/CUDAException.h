#pragma once
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>
#define C10_CUDA_CHECK(EXPRESSION) TORCH_CHECK((EXPRESSION) == cudaSuccess, "a launch failed")
