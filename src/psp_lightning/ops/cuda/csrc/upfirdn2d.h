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

PSP_INLINE Taps first_tap(int64_t out, int down, int pad, int up) {
  const int64_t start = out * down - pad;  // in the upsampled signal
  const int over = static_cast<int>(start % up);  // has the sign of start
  Taps t;
  t.tap = over > 0 ? up - over : -over;
  int64_t pixel = (start + t.tap) / up;  // exact
  int64_t tap = t.tap;
  if (pixel < 0) {
    tap -= pixel * up;
    pixel = 0;
  }
  t.tap = tap > 1000000 ? 1000000 : static_cast<int>(tap);  // beyond any FIR filter
  t.pixel = static_cast<int>(pixel < 2147483647 ? pixel : 2147483647);
  return t;
}

template <typename T, int V, bool LAST>
PSP_INLINE void upfirdn_thread(const Upfirdn& a, const RowTiling& t, uint32_t block, int thread) {
  using A = Wide<T>;
  const RowPlace at = find_row<V, LAST>(t, a.c, block, thread);
  if (!at.valid) return;
  const int64_t step = LAST ? a.c : 1;
  const int64_t in_pixels = static_cast<int64_t>(a.in_h) * a.in_w, out_pixels = static_cast<int64_t>(a.out_h) * a.out_w;
  const T* in = static_cast<const T*>(a.x) + (LAST ? at.n * in_pixels * a.c + at.c : (at.n * a.c + at.c) * in_pixels);
  const A* fir = static_cast<const A*>(a.fir);
  const Taps rows = first_tap(at.strip, a.down_y, a.pad_y, a.up_y);
  const Taps columns = first_tap(at.x, a.down_x, a.pad_x, a.up_x);
  A sum[V];
  for (int v = 0; v < V; ++v) sum[v] = 0;
  for (int i = rows.tap, iy = rows.pixel; i < a.kh && iy < a.in_h; i += a.up_y, ++iy) {
    const A* taps = fir + (a.flip ? i : a.kh - 1 - i) * a.kw;
    for (int j = columns.tap, ix = columns.pixel; j < a.kw && ix < a.in_w; j += a.up_x, ++ix) {
      const A f = taps[a.flip ? j : a.kw - 1 - j];
      const Pack<T, V> pack = load<T, V>(in + (static_cast<int64_t>(iy) * a.in_w + ix) * step);
      for (int v = 0; v < V; ++v) sum[v] += f * widen(pack.item[v]);
    }
  }
  Pack<T, V> pack;
  for (int v = 0; v < V; ++v) pack.item[v] = narrow<T>(sum[v] * A(a.gain));
  const int64_t pixel = static_cast<int64_t>(at.strip) * a.out_w + at.x;
  T* out = static_cast<T*>(a.out) + (LAST ? at.n * out_pixels * a.c + at.c : (at.n * a.c + at.c) * out_pixels);
  store<T, V>(out + pixel * step, pack);
}

}  // namespace psp
