// The work of one thread for  out = clamp(gain * lrelu(demod * x + strength * noise + bias))  and for its gradient.
//
// Tensors are (N, C, P), where P counts pixels, in one of two memory layouts: planes (P fastest, NCHW) or LAST (C
// fastest, channels_last). A thread works on V neighbours in memory: V pixels of one channel, or V channels of one
// pixel. A block handles one sample, one channel (planes) or `tx` packs of channels (LAST), and a chunk of the pixels.
#pragma once
#include "types.h"

namespace psp {

constexpr int ROUNDS = 4, ROUNDS_BACKWARD = 16;  // packs per thread; more if each block reduces sums

struct Epilogue {
  const void* x = nullptr;         // (N, C, P), type T
  const void* demod = nullptr;     // (N, C), wide; null: 1
  const void* noise = nullptr;     // (1 or N, P), wide; null: none
  const void* strength = nullptr;  // (1,), wide; null: 1
  const void* bias = nullptr;      // (C,), wide; null: 0
  void* out = nullptr;             // (N, C, P), type T
  int64_t n = 0, c = 0, pixels = 0;
  int64_t noise_step = 0;  // distance between the noise of consecutive samples: 0 or P
  double slope = 1, gain = 1, clamp = -1;  // clamp < 0: none
};

struct EpilogueBackward {
  const void* dy = nullptr;     // (N, C, P), type T
  const void* y = nullptr;      // (N, C, P), type T, the result of the forward pass; null: no activation
  const void* x = nullptr;      // (N, C, P), type T; null: its sum is 0
  const void* demod = nullptr;  // (N, C), wide; null: 1
  const void* noise = nullptr;  // (1 or N, P), wide; null: its sum is 0
  void* g = nullptr;            // (N, C, P), type T: demod * du
  void* partials = nullptr;     // (N, C, chunks, 3), wide: sums over a chunk of du * x, du, du * noise; null: none
  int64_t n = 0, c = 0, pixels = 0, noise_step = 0;
  double slope = 1, gain = 1, clamp = -1;
};

struct Tiling {
  int tx, ty;              // threads along channels and along pixels; powers of two
  uint32_t tiles, chunks;  // blocks along channels and along pixels
  int64_t packs, chunk;    // packs of pixels in total and in one chunk
  int64_t blocks;
};

template <int V, bool LAST> inline Tiling make_tiling(int64_t n, int64_t c, int64_t pixels, int rounds) {
  Tiling t;
  const int64_t lanes = LAST ? c / V : 1;
  t.packs = LAST ? pixels : pixels / V;
  t.tx = power_of_two(lanes, 32);
  t.ty = power_of_two(t.packs, 256 / t.tx);
  if (t.tx * t.ty < 32) t.ty = 32 / t.tx;
  t.tiles = static_cast<uint32_t>(LAST ? ceil_div(lanes, t.tx) : c);
  t.chunk = static_cast<int64_t>(t.ty) * rounds;
  t.chunks = static_cast<uint32_t>(ceil_div(t.packs, t.chunk));
  t.blocks = n * t.tiles * t.chunks;
  return t;
}

struct Place {  // of one thread
  int64_t n, c;    // sample and first channel
  int64_t pixel;   // first pixel
  int64_t offset;  // of that pixel and channel in a tensor (N, C, P)
  int rounds;      // packs of this thread
  bool valid;
  uint32_t chunk;
};

template <int V, bool LAST>
PSP_INLINE Place find_place(const Tiling& t, int64_t c, int64_t pixels, uint32_t block, int thread) {
  Place p;
  p.chunk = block % t.chunks;
  const uint32_t rest = block / t.chunks, tile = rest % t.tiles;
  p.n = rest / t.tiles;
  p.c = LAST ? (static_cast<int64_t>(tile) * t.tx + thread % t.tx) * V : tile;
  const int64_t first = p.chunk * t.chunk + thread / t.tx, left = t.packs - first;
  const int here = static_cast<int>(t.chunk) - thread / t.tx;  // packs up to the end of the chunk
  p.rounds = ((left < here ? static_cast<int>(left) : here) + t.ty - 1) / t.ty;  // 0 after the last pack
  p.pixel = LAST ? first : first * V;
  p.offset = LAST ? (p.n * pixels + p.pixel) * c + p.c : (p.n * c + p.c) * pixels + p.pixel;
  p.valid = p.c < c;
  return p;
}

// The bound, rounded to T, so that forward and backward compare with the same number.
template <typename T> PSP_INLINE Wide<T> bound(double clamp) {
  return clamp < 0 ? Wide<T>(-1) : Wide<T>(widen(narrow<T>(static_cast<Wide<T>>(clamp))));
}

template <typename A> PSP_INLINE A activate(A u, A slope, A gain, A clamp) {
  u = (u > 0 ? u : u * slope) * gain;
  if (clamp >= 0) u = u > clamp ? clamp : (u < -clamp ? -clamp : u);
  return u;
}

// The derivative of the activation, computed from its result (gain > 0, slope >= 0).
template <typename A> PSP_INLINE A derivative(A y, A slope, A gain, A clamp) {
  if (clamp >= 0 && (y >= clamp || y <= -clamp)) return 0;
  return y > 0 ? gain : gain * slope;
}

// The noise of the pixels of a pack: one value if its items are channels.
template <typename A, int COUNT> struct Noise { A of[COUNT]; };
template <typename A, int COUNT> PSP_INLINE Noise<A, COUNT> load_noise(const A* from) {
  Noise<A, COUNT> noise;
PSP_UNROLL
  for (int k = 0; k < COUNT; ++k) noise.of[k] = from ? from[k] : A(0);
  return noise;
}

template <typename T, int V, bool LAST>
PSP_INLINE void epilogue_thread(const Epilogue& a, const Tiling& t, uint32_t block, int thread) {
  using A = Wide<T>;
  constexpr int G = LAST ? V : 1;  // channels of this thread
  const Place at = find_place<V, LAST>(t, a.c, a.pixels, block, thread);
  if (!at.valid) return;
  const A slope = A(a.slope), gain = A(a.gain), clamp = bound<T>(a.clamp);
  const A strength = a.strength ? *static_cast<const A*>(a.strength) : A(1);
  A scale[G], shift[G];
PSP_UNROLL
  for (int g = 0; g < G; ++g) {
    scale[g] = a.demod ? static_cast<const A*>(a.demod)[at.n * a.c + at.c + g] : A(1);
    shift[g] = a.bias ? static_cast<const A*>(a.bias)[at.c + g] : A(0);
  }
  const int pixels = t.ty * (LAST ? 1 : V);  // from one round to the next
  const int64_t step = LAST ? pixels * a.c : pixels;
  const T* x = static_cast<const T*>(a.x) + at.offset;
  T* out = static_cast<T*>(a.out) + at.offset;
  const A* map = a.noise ? static_cast<const A*>(a.noise) + at.n * a.noise_step + at.pixel : nullptr;
  for (int round = 0; round < at.rounds; ++round, x += step, out += step) {
    const Pack<T, V> given = load<T, V>(x);
    const Noise<A, V / G> noise = load_noise<A, V / G>(map);
    if (map) map += pixels;
    Pack<T, V> result;
PSP_UNROLL
    for (int v = 0; v < V; ++v) {
      const A u = widen(given.item[v]) * scale[LAST ? v : 0] + strength * noise.of[LAST ? 0 : v];
      result.item[v] = narrow<T>(activate(u + shift[LAST ? v : 0], slope, gain, clamp));
    }
    store<T, V>(out, result);
  }
}

// Adds this thread's share of the three sums of each of its channels to `sums` (LAST ? V : 1, 3).
template <typename T, int V, bool LAST>
PSP_INLINE void epilogue_backward_thread(
    const EpilogueBackward& a, const Tiling& t, uint32_t block, int thread, Wide<T>* sums) {
  using A = Wide<T>;
  constexpr int G = LAST ? V : 1;
  const Place at = find_place<V, LAST>(t, a.c, a.pixels, block, thread);
  if (!at.valid) return;
  const A slope = A(a.slope), gain = A(a.gain), clamp = bound<T>(a.clamp);
  A scale[G];
PSP_UNROLL
  for (int g = 0; g < G; ++g) scale[g] = a.demod ? static_cast<const A*>(a.demod)[at.n * a.c + at.c + g] : A(1);
  const bool with_sums = a.partials, with_y = a.y, with_x = a.x && with_sums;
  const int pixels = t.ty * (LAST ? 1 : V);
  const int64_t step = LAST ? pixels * a.c : pixels;
  int64_t i = at.offset;
  const A* map = a.noise && with_sums ? static_cast<const A*>(a.noise) + at.n * a.noise_step + at.pixel : nullptr;
  for (int round = 0; round < at.rounds; ++round, i += step) {
    const Pack<T, V> dy = load<T, V>(static_cast<const T*>(a.dy) + i);
    const Pack<T, V> y = load_if<T, V>(with_y, static_cast<const T*>(a.y) + i);
    const Pack<T, V> x = load_if<T, V>(with_x, static_cast<const T*>(a.x) + i);
    const Noise<A, V / G> noise = load_noise<A, V / G>(map);
    if (map) map += pixels;
    A du[V];
PSP_UNROLL
    for (int v = 0; v < V; ++v) du[v] = widen(dy.item[v]);
    if (with_y) {
PSP_UNROLL
      for (int v = 0; v < V; ++v) du[v] *= derivative(A(widen(y.item[v])), slope, gain, clamp);
    }
    if (with_sums) {
PSP_UNROLL
      for (int v = 0; v < V; ++v) {
        A* sum = sums + (LAST ? v : 0) * 3;
        sum[0] += du[v] * widen(x.item[v]);
        sum[1] += du[v];
        sum[2] += du[v] * noise.of[LAST ? 0 : v];
      }
    }
    Pack<T, V> result;
PSP_UNROLL
    for (int v = 0; v < V; ++v) result.item[v] = narrow<T>(du[v] * scale[LAST ? v : 0]);
    store<T, V>(static_cast<T*>(a.g) + i, result);
  }
}

// The index in `partials` of the three sums of a channel over a chunk.
PSP_INLINE int64_t partial_index(const Tiling& t, int64_t c, const Place& at, int channel) {
  return ((at.n * c + at.c + channel) * t.chunks + at.chunk) * 3;
}

}  // namespace psp
