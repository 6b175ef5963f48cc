// Stands in for the CUDA runtime's header where the kernels are run on the CPU.
#pragma once
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
