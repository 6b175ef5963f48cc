// The work of one thread for upfirdn2d with any factors, padding and FIR filter: one output pixel, of V channels if
// LAST. Taps that would meet an inserted zero are skipped, not multiplied.
//   out[oy, ox] = gain * sum over i, j of f(i, j) * z[oy * down_y + i - pad_y, ox * down_x + j - pad_x],
//   z[u, v] = x[u / up_y, v / up_x] if both divide, otherwise 0;  f is fir rotated by 180 degrees, or fir if flip.
#pragma once
#include "fir_epilogue.h"

namespace psp {

struct Upfirdn {
  const void* x = nullptr;
  const void* fir = nullptr;  // (kh, kw), wide
  void* out = nullptr;
  int64_t n = 0, c = 0;
  int in_h = 0, in_w = 0, out_h = 0, out_w = 0, kh = 0, kw = 0;
  int up_y = 1, up_x = 1, down_y = 1, down_x = 1, pad_y = 0, pad_x = 0;
  bool flip = false;  // apply fir unrotated, as a correlation
  double gain = 1;
};

// The taps of one axis that meet a pixel: tap, tap + up, ... meet pixel, pixel + 1, ...
struct Taps {
  int tap, pixel;
};

// All in 32 bits: bindings.cpp bounds the sizes of both signals.
PSP_INLINE Taps first_tap(int out, int down, int pad, int up) {
  const int start = out * down - pad;  // in the upsampled signal
  const uint32_t here = start > 0 ? start : 0, factor = up;
  const uint32_t pixel = factor == 1 ? here : (here + factor - 1) / factor;
  return {static_cast<int>(pixel * factor) - start, static_cast<int>(pixel)};
}

template <typename T, int V, bool LAST>
PSP_INLINE void upfirdn_thread(const Upfirdn& a, const RowTiling& t, uint32_t block, int thread) {
  using A = Wide<T>;
  const RowPlace at = find_row<V, LAST>(t, a.c, block, thread);
  if (!at.valid) return;
  const Taps rows = first_tap(static_cast<int>(at.strip), a.down_y, a.pad_y, a.up_y);
  const Taps columns = first_tap(at.x, a.down_x, a.pad_x, a.up_x);
  const int64_t step = LAST ? a.c : 1;  // from one pixel to the next
  const int64_t in_pixels = static_cast<int64_t>(a.in_h) * a.in_w, out_pixels = static_cast<int64_t>(a.out_h) * a.out_w;
  const int64_t plane = LAST ? at.n : at.n * a.c + at.c, channel = LAST ? at.c : 0, all = LAST ? a.c : 1;
  const int64_t in_pixel = static_cast<int64_t>(rows.pixel) * a.in_w + columns.pixel, in_line = a.in_w * step;
  const int64_t out_pixel = static_cast<int64_t>(at.strip) * a.out_w + at.x;
  const T* line = static_cast<const T*>(a.x) + (plane * in_pixels + in_pixel) * all + channel;
  const int last = a.kh * a.kw - 1, turn = a.flip ? 1 : -1;  // unless flip, the taps are read backwards
  const A* fir = static_cast<const A*>(a.fir) + (a.flip ? 0 : last);
  A sum[V];
PSP_UNROLL
  for (int v = 0; v < V; ++v) sum[v] = 0;
  for (int i = rows.tap, iy = rows.pixel; i < a.kh && iy < a.in_h; i += a.up_y, ++iy, line += in_line) {
    const T* from = line;
    for (int j = columns.tap, ix = columns.pixel; j < a.kw && ix < a.in_w; j += a.up_x, ++ix, from += step) {
      const A f = fir[(i * a.kw + j) * turn];
      const Pack<T, V> pack = load<T, V>(from);
PSP_UNROLL
      for (int v = 0; v < V; ++v) sum[v] += f * widen(pack.item[v]);
    }
  }
  Pack<T, V> pack;
PSP_UNROLL
  for (int v = 0; v < V; ++v) pack.item[v] = narrow<T>(sum[v] * A(a.gain));
  store<T, V>(static_cast<T*>(a.out) + (plane * out_pixels + out_pixel) * all + channel, pack);
}

}  // namespace psp
