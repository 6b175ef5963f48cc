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
  int64_t n, c, first, end;  // sample, first channel, first pack of pixels, end of the chunk
  bool valid;
  uint32_t chunk;
};

template <int V, bool LAST> PSP_INLINE Place find_place(const Tiling& t, int64_t c, uint32_t block, int thread) {
  Place p;
  p.chunk = block % t.chunks;
  const uint32_t rest = block / t.chunks, tile = rest % t.tiles;
  p.n = rest / t.tiles;
  p.c = LAST ? (static_cast<int64_t>(tile) * t.tx + thread % t.tx) * V : tile;
  p.first = p.chunk * t.chunk + thread / t.tx;
  const int64_t end = (p.chunk + int64_t(1)) * t.chunk;
  p.end = end < t.packs ? end : t.packs;
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

template <typename T, int V, bool LAST>
PSP_INLINE void epilogue_thread(const Epilogue& a, const Tiling& t, uint32_t block, int thread) {
  using A = Wide<T>;
  constexpr int G = LAST ? V : 1;  // channels of this thread
  const Place at = find_place<V, LAST>(t, a.c, block, thread);
  if (!at.valid) return;
  const A slope = A(a.slope), gain = A(a.gain), clamp = bound<T>(a.clamp);
  const A strength = a.strength ? *static_cast<const A*>(a.strength) : A(1);
  A scale[G], shift[G];
  for (int g = 0; g < G; ++g) {
    scale[g] = a.demod ? static_cast<const A*>(a.demod)[at.n * a.c + at.c + g] : A(1);
    shift[g] = a.bias ? static_cast<const A*>(a.bias)[at.c + g] : A(0);
  }
  for (int64_t p = at.first; p < at.end; p += t.ty) {
    const int64_t pixel = LAST ? p : p * V;
    const int64_t i = LAST ? (at.n * a.pixels + pixel) * a.c + at.c : (at.n * a.c + at.c) * a.pixels + pixel;
    const A* noise = a.noise ? static_cast<const A*>(a.noise) + at.n * a.noise_step + pixel : nullptr;
    Pack<T, V> pack = load<T, V>(static_cast<const T*>(a.x) + i);
    for (int v = 0; v < V; ++v) {
      A u = widen(pack.item[v]) * scale[LAST ? v : 0];
      if (noise) u += strength * noise[LAST ? 0 : v];
      pack.item[v] = narrow<T>(activate(u + shift[LAST ? v : 0], slope, gain, clamp));
    }
    store<T, V>(static_cast<T*>(a.out) + i, pack);
  }
}

// Adds this thread's share of the three sums of each of its channels to `sums` (LAST ? V : 1, 3).
template <typename T, int V, bool LAST>
PSP_INLINE void epilogue_backward_thread(
    const EpilogueBackward& a, const Tiling& t, uint32_t block, int thread, Wide<T>* sums) {
  using A = Wide<T>;
  constexpr int G = LAST ? V : 1;
  const Place at = find_place<V, LAST>(t, a.c, block, thread);
  if (!at.valid) return;
  const A slope = A(a.slope), gain = A(a.gain), clamp = bound<T>(a.clamp);
  A scale[G];
  for (int g = 0; g < G; ++g) scale[g] = a.demod ? static_cast<const A*>(a.demod)[at.n * a.c + at.c + g] : A(1);
  for (int64_t p = at.first; p < at.end; p += t.ty) {
    const int64_t pixel = LAST ? p : p * V;
    const int64_t i = LAST ? (at.n * a.pixels + pixel) * a.c + at.c : (at.n * a.c + at.c) * a.pixels + pixel;
    const A* noise = a.noise ? static_cast<const A*>(a.noise) + at.n * a.noise_step + pixel : nullptr;
    Pack<T, V> pack = load<T, V>(static_cast<const T*>(a.dy) + i);
    A du[V];
    for (int v = 0; v < V; ++v) du[v] = widen(pack.item[v]);
    if (a.y) {
      const Pack<T, V> y = load<T, V>(static_cast<const T*>(a.y) + i);
      for (int v = 0; v < V; ++v) du[v] *= derivative(A(widen(y.item[v])), slope, gain, clamp);
    }
    if (a.partials) {
      if (a.x) {
        const Pack<T, V> x = load<T, V>(static_cast<const T*>(a.x) + i);
        for (int v = 0; v < V; ++v) sums[(LAST ? v : 0) * 3] += du[v] * widen(x.item[v]);
      }
      for (int v = 0; v < V; ++v) {
        sums[(LAST ? v : 0) * 3 + 1] += du[v];
        if (noise) sums[(LAST ? v : 0) * 3 + 2] += du[v] * noise[LAST ? 0 : v];
      }
    }
    if (a.g) {
      for (int v = 0; v < V; ++v) pack.item[v] = narrow<T>(du[v] * scale[LAST ? v : 0]);
      store<T, V>(static_cast<T*>(a.g) + i, pack);
    }
  }
}

// The index in `partials` of the three sums of a channel over a chunk.
PSP_INLINE int64_t partial_index(const Tiling& t, int64_t c, const Place& at, int channel) {
  return ((at.n * c + at.c + channel) * t.chunks + at.chunk) * 3;
}

}  // namespace psp
