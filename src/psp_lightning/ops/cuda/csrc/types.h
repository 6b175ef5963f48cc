// Number types and 16-byte loads. Everything here also compiles as plain C++, for the tests on the CPU.
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define PSP_INLINE __host__ __device__ __forceinline__
#define PSP_UNROLL _Pragma("unroll")
#else
#define PSP_INLINE inline
#define PSP_UNROLL
#endif

namespace psp {

enum class Kind { f32, f64, f16, bf16 };

// The type of sums and small tensors (bias, noise, factors, FIR filters).
template <typename T> struct WideOf { using type = float; };
template <> struct WideOf<double> { using type = double; };
template <typename T> using Wide = typename WideOf<T>::type;

PSP_INLINE float widen(float x) { return x; }
PSP_INLINE double widen(double x) { return x; }
template <typename T> PSP_INLINE T narrow(Wide<T> x) { return static_cast<T>(x); }
#ifdef __CUDACC__
// Functions, not casts: PyTorch's build flags disable the implicit conversions of the half types.
PSP_INLINE float widen(__half x) { return __half2float(x); }
PSP_INLINE float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
template <> PSP_INLINE __half narrow<__half>(float x) { return __float2half_rn(x); }
template <> PSP_INLINE __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
#endif

// V neighbours in memory, read and written by one instruction; the address must be a multiple of their size.
template <typename T, int V> struct alignas(sizeof(T) * V) Pack { T item[V]; };

// A pack of 16 bytes is copied as one vector: the compiler would split a struct that it has assembled from parts.
#ifdef __CUDACC__
template <typename P, size_t SIZE = sizeof(P)> struct RawOf { using type = P; };
template <typename P> struct RawOf<P, 16> { using type = uint4; };
#else
template <typename P> struct RawOf { using type = P; };
#endif

// The pack at `from`, or zeros if it is not `there`: one load under a condition, not a branch.
template <typename T, int V> PSP_INLINE Pack<T, V> load_if(bool there, const T* from) {
  using Raw = typename RawOf<Pack<T, V>>::type;
  Raw raw{};
  if (there) raw = *reinterpret_cast<const Raw*>(from);
  Pack<T, V> pack;
  memcpy(&pack, &raw, sizeof pack);
  return pack;
}
template <typename T, int V> PSP_INLINE Pack<T, V> load(const T* from) { return load_if<T, V>(true, from); }
template <typename T, int V> PSP_INLINE void store(T* to, const Pack<T, V>& pack) {
  using Raw = typename RawOf<Pack<T, V>>::type;
  Raw raw;
  memcpy(&raw, &pack, sizeof raw);
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(Raw) == 16) {
    __stwb(reinterpret_cast<Raw*>(to), raw);  // an assignment may be split too
    return;
  }
#endif
  *reinterpret_cast<Raw*>(to) = raw;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int power_of_two(int64_t at_least, int at_most) {
  int value = 1;
  while (value < at_least && value < at_most) value *= 2;
  return value;
}

}  // namespace psp
