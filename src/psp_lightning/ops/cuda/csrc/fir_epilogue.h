// The work of one thread for the epilogue after a separable 4x4 FIR filter:
//   u[oy, ox] = sum over i, j of fy[i] * fx[j] * x[oy + i - pad_y, ox + j - pad_x],  0 outside of x.
//
// A thread walks down a strip of output rows in one column. It filters each input row along x once and adds it to the
// outputs that use it. Four of them are unfinished at a time, in a ring of registers, so a strip can have any length and
// fetches a pixel four times instead of sixteen. Four rows come on top: three that its last outputs need, and one in
// vain, because rows are fetched in fours. Not to fetch it would take registers that there are not.
#pragma once
#include "epilogue.h"

namespace psp {

constexpr int TAPS = 4;

// Rows of a strip: long ones fetch less twice, short ones give small maps more threads.
inline int strip_rows(int out_h) { return out_h >= 64 ? 16 : 4; }

struct FirEpilogue {
  Epilogue e;  // e.pixels = out_h * out_w
  const void* fy = nullptr;  // (4,), wide, in correlation order
  const void* fx = nullptr;
  int in_h = 0, in_w = 0, out_h = 0, out_w = 0, pad_y = 0, pad_x = 0;
};

// Each block handles a plane or sample, a strip of rows, and a tile of the row's lanes. Shared with upfirdn2d.h.
struct RowTiling {
  int threads, rows;       // rows of a strip
  uint32_t lanes, tiles, strips;  // a lane is a column, times a pack of channels if LAST
  int64_t blocks;
};

inline RowTiling make_row_tiling(int64_t n, int64_t c, int out_h, int out_w, int v, bool last, int rows) {
  RowTiling t;
  t.rows = rows;
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

template <typename T, int V, bool LAST>
PSP_INLINE void fir_epilogue_thread(const FirEpilogue& f, const RowTiling& t, uint32_t block, int thread) {
  using A = Wide<T>;
  const Epilogue& a = f.e;
  const RowPlace at = find_row<V, LAST>(t, a.c, block, thread);
  if (!at.valid) return;
  const A slope = A(a.slope), gain = A(a.gain), clamp = bound<T>(a.clamp);
  const A strength = a.strength ? *static_cast<const A*>(a.strength) : A(1);
  A fx[TAPS], fy[TAPS], scale[V], shift[V];
PSP_UNROLL
  for (int i = 0; i < TAPS; ++i) {
    fx[i] = static_cast<const A*>(f.fx)[i];
    fy[i] = static_cast<const A*>(f.fy)[i];
  }
PSP_UNROLL
  for (int v = 0; v < V; ++v) {  // V is 1 for planes
    scale[v] = a.demod ? static_cast<const A*>(a.demod)[at.n * a.c + at.c + v] : A(1);
    shift[v] = a.bias ? static_cast<const A*>(a.bias)[at.c + v] : A(0);
  }

  const int first = static_cast<int>(at.strip) * t.rows;
  const int rows = f.out_h - first < t.rows ? f.out_h - first : t.rows;
  const int64_t step = LAST ? a.c : 1;  // from one pixel to the next
  const int64_t in_pixels = static_cast<int64_t>(f.in_h) * f.in_w, plane = LAST ? at.n : at.n * a.c + at.c;
  const int64_t channel = LAST ? at.c : 0, all = LAST ? a.c : 1;
  const int64_t in_pixel = static_cast<int64_t>(first - f.pad_y) * f.in_w + at.x - f.pad_x;
  const int64_t out_pixel = static_cast<int64_t>(first) * f.out_w + at.x;
  const T* in = static_cast<const T*>(a.x) + (plane * in_pixels + in_pixel) * all + channel;  // may be outside
  T* out = static_cast<T*>(a.out) + (plane * a.pixels + out_pixel) * all + channel;
  const A* noise = a.noise ? static_cast<const A*>(a.noise) + at.n * a.noise_step + out_pixel : nullptr;
  const int64_t in_line = f.in_w * step, out_line = f.out_w * step;
  bool inside[TAPS];
PSP_UNROLL
  for (int j = 0; j < TAPS; ++j)
    inside[j] = static_cast<unsigned>(at.x + j - f.pad_x) < static_cast<unsigned>(f.in_w);

  A ring[TAPS][V] = {};  // row r of the strip is kept in ring[r % TAPS] until it is finished
  for (int group = 0; group < rows + TAPS - 1; group += TAPS) {
PSP_UNROLL
    for (int k = 0; k < TAPS; ++k, in += in_line) {
      const int r = group + k, finished = r - (TAPS - 1);  // the input row, and the output row whose last tap it is
      const bool there = static_cast<unsigned>(first + r - f.pad_y) < static_cast<unsigned>(f.in_h);
      const bool ends = static_cast<unsigned>(finished) < static_cast<unsigned>(rows);
      Pack<T, V> taps[TAPS];
PSP_UNROLL
      for (int j = 0; j < TAPS; ++j) taps[j] = load_if<T, V>(there && inside[j], in + j * step);
      const A extra = load_if<A, 1>(noise && ends, noise).item[0];
      A row[V];
PSP_UNROLL
      for (int v = 0; v < V; ++v) {
        row[v] = 0;
PSP_UNROLL
        for (int j = 0; j < TAPS; ++j) row[v] += fx[j] * widen(taps[j].item[v]);
        ring[k][v] = fy[0] * row[v];  // a new output
PSP_UNROLL
        for (int i = 1; i < TAPS; ++i) ring[(k + TAPS - i) % TAPS][v] += fy[i] * row[v];
      }
      if (!ends) continue;
      Pack<T, V> pack;
PSP_UNROLL
      for (int v = 0; v < V; ++v) {
        const A u = ring[(k + 1) % TAPS][v] * scale[v] + strength * extra;
        pack.item[v] = narrow<T>(activate(u + shift[v], slope, gain, clamp));
      }
      store<T, V>(out, pack);
      out += out_line;
      if (noise) noise += f.out_w;
    }
  }
}

}  // namespace psp
