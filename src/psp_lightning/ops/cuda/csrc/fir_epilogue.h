// The work of one thread for the epilogue after a separable 4x4 FIR filter:
//   u[oy, ox] = sum over i, j of fy[i] * fx[j] * x[oy + i - pad_y, ox + j - pad_x],  0 outside of x.
//
// A thread walks down a strip of S output rows in one column. It filters each input row along x once and adds it to the
// outputs that use it, four at most, all in registers. So it fetches a pixel four times instead of sixteen.
#pragma once
#include "epilogue.h"

namespace psp {

constexpr int TAPS = 4;
constexpr int ROWS = 8, ROWS_OF_PACKS = 4;  // of a strip; 4 rows of 8 channels are 32 sums in registers

struct FirEpilogue {
  Epilogue e;  // e.pixels = out_h * out_w
  const void* fy = nullptr;  // (4,), wide, in correlation order
  const void* fx = nullptr;
  int in_h = 0, in_w = 0, out_h = 0, out_w = 0, pad_y = 0, pad_x = 0;
};

// Each block handles a plane or sample, a strip of rows, and a tile of the row's lanes. Shared with upfirdn2d.h.
struct RowTiling {
  int threads;
  uint32_t lanes, tiles, strips;  // a lane is a column, times a pack of channels if LAST
  int64_t blocks;
};

inline RowTiling make_row_tiling(int64_t n, int64_t c, int out_h, int out_w, int v, bool last, int rows) {
  RowTiling t;
  t.lanes = static_cast<uint32_t>(last ? out_w * (c / v) : out_w);
  t.threads = power_of_two(t.lanes, 256);
  if (t.threads < 32) t.threads = 32;
  t.tiles = static_cast<uint32_t>(ceil_div(t.lanes, t.threads));
  t.strips = static_cast<uint32_t>(ceil_div(out_h, rows));
  t.blocks = (last ? n : n * c) * t.tiles * t.strips;
  return t;
}

struct RowPlace {
  int64_t n, c;  // sample and first channel
  uint32_t strip;
  int x;
  bool valid;
};

template <int V, bool LAST> PSP_INLINE RowPlace find_row(const RowTiling& t, int64_t c, uint32_t block, int thread) {
  RowPlace p;
  const uint32_t rest = block / t.tiles, plane = rest / t.strips;
  const uint32_t lane = block % t.tiles * t.threads + thread;
  p.strip = rest % t.strips;
  p.valid = lane < t.lanes;
  const uint32_t channels = static_cast<uint32_t>(c), packs = LAST ? channels / V : 1;
  p.x = static_cast<int>(LAST ? lane / packs : lane);
  p.c = LAST ? static_cast<int64_t>(lane % packs) * V : plane % channels;
  p.n = LAST ? plane : plane / channels;
  return p;
}

template <typename T, int V, int S, bool LAST>
PSP_INLINE void fir_epilogue_thread(const FirEpilogue& f, const RowTiling& t, uint32_t block, int thread) {
  using A = Wide<T>;
  const Epilogue& a = f.e;
  const RowPlace at = find_row<V, LAST>(t, a.c, block, thread);
  if (!at.valid) return;
  const int64_t step = LAST ? a.c : 1;  // from one pixel to the next
  const int64_t in_pixels = static_cast<int64_t>(f.in_h) * f.in_w;
  const T* in = static_cast<const T*>(a.x) + (LAST ? at.n * in_pixels * a.c + at.c : (at.n * a.c + at.c) * in_pixels);
  A fx[TAPS], fy[TAPS];
PSP_UNROLL
  for (int i = 0; i < TAPS; ++i) {
    fx[i] = static_cast<const A*>(f.fx)[i];
    fy[i] = static_cast<const A*>(f.fy)[i];
  }
  A sum[S][V];
PSP_UNROLL
  for (int s = 0; s < S; ++s)
PSP_UNROLL
    for (int v = 0; v < V; ++v) sum[s][v] = 0;

  const int first = static_cast<int>(at.strip) * S;
PSP_UNROLL
  for (int r = 0; r < S + TAPS - 1; ++r) {
    const int iy = first + r - f.pad_y;
    if (iy < 0 || iy >= f.in_h) continue;
    A row[V];
PSP_UNROLL
    for (int v = 0; v < V; ++v) row[v] = 0;
PSP_UNROLL
    for (int j = 0; j < TAPS; ++j) {
      const int ix = at.x + j - f.pad_x;
      if (ix < 0 || ix >= f.in_w) continue;
      const Pack<T, V> pack = load<T, V>(in + (static_cast<int64_t>(iy) * f.in_w + ix) * step);
PSP_UNROLL
      for (int v = 0; v < V; ++v) row[v] += fx[j] * widen(pack.item[v]);
    }
PSP_UNROLL
    for (int s = 0; s < S; ++s)
      if (r - s >= 0 && r - s < TAPS)
PSP_UNROLL
        for (int v = 0; v < V; ++v) sum[s][v] += fy[r - s] * row[v];
  }

  const A slope = A(a.slope), gain = A(a.gain), clamp = bound<T>(a.clamp);
  const A strength = a.strength ? *static_cast<const A*>(a.strength) : A(1);
  A scale[V], shift[V];
PSP_UNROLL
  for (int v = 0; v < V; ++v) {  // V is 1 for planes
    scale[v] = a.demod ? static_cast<const A*>(a.demod)[at.n * a.c + at.c + v] : A(1);
    shift[v] = a.bias ? static_cast<const A*>(a.bias)[at.c + v] : A(0);
  }
  T* out = static_cast<T*>(a.out) + (LAST ? at.n * a.pixels * a.c + at.c : (at.n * a.c + at.c) * a.pixels);
PSP_UNROLL
  for (int s = 0; s < S; ++s) {
    if (first + s >= f.out_h) break;
    const int64_t pixel = static_cast<int64_t>(first + s) * f.out_w + at.x;
    const A noise = a.noise ? strength * static_cast<const A*>(a.noise)[at.n * a.noise_step + pixel] : A(0);
    Pack<T, V> pack;
PSP_UNROLL
    for (int v = 0; v < V; ++v)
      pack.item[v] = narrow<T>(activate(sum[s][v] * scale[v] + noise + shift[v], slope, gain, clamp));
    store<T, V>(out + pixel * step, pack);
  }
}

}  // namespace psp
