// The PyTorch bindings of the kernels: operators in the namespace psp_lightning_cuda that fill tensors allocated by the
// caller. ops/cuda/launch.py prepares their arguments (dtype, memory layout, broadcasting). The checks here turn its
// mistakes into errors instead of bad addresses. Each operator runs on the device of its first tensor, on the current
// stream of that device.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>

#include "launch.h"

namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using psp::Kind;

Kind kind_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Kind::f32;
    case at::kDouble: return Kind::f64;
    case at::kHalf: return Kind::f16;
    case at::kBFloat16: return Kind::bf16;
    default: TORCH_CHECK(false, "psp_lightning kernels: no kernel for ", x.scalar_type());
  }
}

at::ScalarType wide_of(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// The sizes of (N, C, ...) that the kernels use.
struct Shape {
  int64_t n, c, pixels = 1;
  explicit Shape(const Tensor& x) {
    TORCH_CHECK(x.is_cuda() && x.dim() >= 2, "psp_lightning kernels: expected a CUDA tensor (N, C, ...)");
    n = x.size(0), c = x.size(1);
    for (int64_t i = 2; i < x.dim(); ++i) pixels *= x.size(i);
  }
};

// The memory layouts that all tensors of a call share. A tensor with one channel or one pixel has both.
struct Order {
  bool planes = true, last = true;
  void meet(const Tensor& x) {
    planes = planes && x.is_contiguous();
    last = last && (x.dim() == 4 ? x.is_contiguous(at::MemoryFormat::ChannelsLast)
                                 : x.is_contiguous() && x.numel() == x.size(0) * x.size(1));
    TORCH_CHECK(planes || last, "psp_lightning kernels: the tensors have different memory layouts");
  }
  bool channels_last(const Shape& s) const { return last && (!planes || s.pixels == 1); }
};

int int_of(int64_t value) {
  TORCH_CHECK(value < (1 << 30) && value > -(1 << 30), "psp_lightning kernels: size ", value, " is out of range");
  return static_cast<int>(value);
}

// Check dtype, device and layout against `like`, and the shape too if `shape` is set; return the data pointer.
void* same(const MaybeTensor& t, const Tensor& like, Order& order, bool shape, const char* name) {
  if (!t.has_value()) return nullptr;
  TORCH_CHECK(
      t->device() == like.device() && t->scalar_type() == like.scalar_type() && t->dim() == like.dim() &&
          (!shape || t->sizes() == like.sizes()),
      "psp_lightning kernels: ", name, " does not match the other tensors");
  order.meet(*t);
  return t->data_ptr();
}

// Check for a contiguous tensor of the wide type with `numel` elements; return its data pointer.
void* small(const MaybeTensor& t, const Tensor& x, int64_t numel, const char* name) {
  if (!t.has_value()) return nullptr;
  TORCH_CHECK(
      t->device() == x.device() && t->scalar_type() == wide_of(x) && t->is_contiguous() && t->numel() == numel,
      "psp_lightning kernels: ", name, " needs ", numel, " contiguous elements of ", wide_of(x), " on the device of x");
  return t->data_ptr();
}

int64_t noise_step(const MaybeTensor& noise, const Shape& s) {
  return noise.has_value() && noise->numel() == s.n * s.pixels && s.n > 1 ? s.pixels : 0;
}

void* noise_data(const MaybeTensor& noise, const Tensor& x, const Shape& s) {
  return small(noise, x, noise_step(noise, s) ? s.n * s.pixels : s.pixels, "noise");
}

void epilogue(
    const Tensor& out, const Tensor& x, const MaybeTensor& fy, const MaybeTensor& fx, at::IntArrayRef pad,
    const MaybeTensor& demod, const MaybeTensor& noise, const MaybeTensor& strength, const MaybeTensor& bias,
    double slope, double gain, double clamp) {
  const Shape s(out);
  Order order;
  psp::FirEpilogue f;
  psp::Epilogue& e = f.e;
  e.out = same(out, x, order, !fy.has_value(), "out");
  e.x = same(x, out, order, false, "x");
  e.n = s.n, e.c = s.c, e.pixels = s.pixels;
  e.demod = small(demod, x, s.n * s.c, "demod");
  e.noise = noise_data(noise, x, s);
  e.noise_step = noise_step(noise, s);
  e.strength = small(strength, x, 1, "strength");
  e.bias = small(bias, x, s.c, "bias");
  e.slope = slope, e.gain = gain, e.clamp = clamp;
  const c10::cuda::CUDAGuard guard(x.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
  if (!fy.has_value()) {
    C10_CUDA_CHECK(psp::launch_epilogue(e, kind_of(x), order.channels_last(s), stream));
    return;
  }
  TORCH_CHECK(fx.has_value() && pad.size() == 2, "psp_lightning kernels: fir needs two factors and the padding");
  TORCH_CHECK(x.dim() == 4 && x.size(0) == s.n && x.size(1) == s.c, "psp_lightning kernels: out does not match x");
  f.fy = small(fy, x, psp::TAPS, "fy");
  f.fx = small(fx, x, psp::TAPS, "fx");
  f.in_h = int_of(x.size(2)), f.in_w = int_of(x.size(3));
  f.out_h = int_of(out.size(2)), f.out_w = int_of(out.size(3));
  f.pad_y = int_of(pad[0]), f.pad_x = int_of(pad[1]);
  int_of(f.out_w * s.c);  // the lanes of a row are counted in 32 bits
  C10_CUDA_CHECK(psp::launch_fir_epilogue(f, kind_of(x), order.channels_last(s), stream));
}

Tensor epilogue_backward(
    const Tensor& g, const Tensor& dy, const MaybeTensor& y, const MaybeTensor& x, const MaybeTensor& demod,
    const MaybeTensor& noise, double slope, double gain, double clamp, bool sums) {
  const Shape s(dy);
  Order order;
  psp::EpilogueBackward e;
  e.dy = same(dy, dy, order, true, "dy");
  e.y = same(y, dy, order, true, "y");
  e.x = same(x, dy, order, true, "x");
  e.g = same(g, dy, order, true, "g");
  const bool last = order.channels_last(s);
  e.n = s.n, e.c = s.c, e.pixels = s.pixels;
  e.demod = small(demod, dy, s.n * s.c, "demod");
  e.noise = noise_data(noise, dy, s);
  e.noise_step = noise_step(noise, s);
  e.slope = slope, e.gain = gain, e.clamp = clamp;
  const c10::cuda::CUDAGuard guard(dy.device());
  const int64_t chunks = sums ? psp::backward_chunks(e, kind_of(dy), last) : 0;
  Tensor partials = at::empty({s.n, s.c, chunks, 3}, dy.options().dtype(wide_of(dy)), at::MemoryFormat::Contiguous);
  if (sums) e.partials = partials.data_ptr();
  C10_CUDA_CHECK(psp::launch_epilogue_backward(e, kind_of(dy), last, c10::cuda::getCurrentCUDAStream().stream()));
  return partials;
}

void upfirdn2d(
    const Tensor& out, const Tensor& x, const Tensor& fir, at::IntArrayRef up, at::IntArrayRef down,
    at::IntArrayRef pad, bool flip, double gain) {
  const Shape s(out);
  Order order;
  TORCH_CHECK(
      x.dim() == 4 && x.size(0) == s.n && x.size(1) == s.c && fir.dim() == 2 && up.size() == 2 && down.size() == 2 &&
          pad.size() == 2 && up[0] > 0 && up[1] > 0 && down[0] > 0 && down[1] > 0,
      "psp_lightning kernels: the arguments of upfirdn2d do not match each other");
  psp::Upfirdn a;
  a.out = same(out, x, order, false, "out");
  a.x = same(x, out, order, false, "x");
  a.fir = small(fir, x, fir.numel(), "fir");
  a.n = s.n, a.c = s.c;
  a.in_h = int_of(x.size(2)), a.in_w = int_of(x.size(3));
  a.out_h = int_of(out.size(2)), a.out_w = int_of(out.size(3));
  a.kh = int_of(fir.size(0)), a.kw = int_of(fir.size(1));
  a.up_y = int_of(up[0]), a.up_x = int_of(up[1]);
  a.down_y = int_of(down[0]), a.down_x = int_of(down[1]);
  a.pad_y = int_of(pad[0]), a.pad_x = int_of(pad[1]);
  a.flip = flip, a.gain = gain;
  int_of(up[0] * x.size(2)), int_of(up[1] * x.size(3));  // positions in both signals are counted in 32 bits
  int_of(down[0] * out.size(2)), int_of(down[1] * out.size(3));
  int_of(fir.numel());
  int_of(a.out_w * s.c);
  const c10::cuda::CUDAGuard guard(x.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
  C10_CUDA_CHECK(psp::launch_upfirdn(a, kind_of(x), order.channels_last(s), stream));
}

}  // namespace

TORCH_LIBRARY(psp_lightning_cuda, m) {
  m.def(
      "epilogue(Tensor(a!) out, Tensor x, Tensor? fy, Tensor? fx, int[] pad, Tensor? demod, Tensor? noise, "
      "Tensor? strength, Tensor? bias, float slope, float gain, float clamp) -> ()",
      &epilogue);
  m.def(
      "epilogue_backward(Tensor(a!) g, Tensor dy, Tensor? y, Tensor? x, Tensor? demod, Tensor? noise, float slope, "
      "float gain, float clamp, bool sums) -> Tensor",
      &epilogue_backward);
  m.def(
      "upfirdn2d(Tensor(a!) out, Tensor x, Tensor fir, int[] up, int[] down, int[] pad, bool flip, float gain) -> ()",
      &upfirdn2d);
}
