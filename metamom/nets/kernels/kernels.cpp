// The operators of metamom.layers on a CPU, for one pass over memory each where plain PyTorch takes many.
//
// Images are channels-last, [B, H, W, C]; normalised activations are [G, M, C]: G groups (tasks), M positions whose
// statistics are taken together, C channels. What each operator computes is written in reference.py, its twin.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

namespace {

using at::Tensor;

// Channels handled together: their running sums stay in vector registers.
constexpr int64_t WIDTH = 64;
// Rows summed before their sum is added to the total: keeps the rounding error of long sums small.
constexpr int64_t RUN = 32;

int64_t halved(int64_t size) { return (size + 1) / 2; }

template <typename T>
void unfold_rows(const T* x, T* out, int64_t begin, int64_t end, int64_t H, int64_t W, int64_t C) {
  const int64_t oh = halved(H), ow = halved(W);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / oh, o = row % oh;
    for (int64_t i = 0; i < 3; ++i) {
      const int64_t h = 2 * o + i - 1;
      T* to = out + row * ow * 9 * C + i * 3 * C;
      if (h < 0 || h >= H) {
        for (int64_t p = 0; p < ow; ++p) std::memset(to + p * 9 * C, 0, 3 * C * sizeof(T));
        continue;
      }
      const T* from = x + (image * H + h) * W * C;
      for (int64_t p = 0; p < ow; ++p, to += 9 * C) {
        const int64_t left = 2 * p - 1, first = left < 0 ? 1 : 0, last = std::min<int64_t>(3, W - left);
        if (first > 0) std::memset(to, 0, C * sizeof(T));
        if (C == 1) {
          for (int64_t j = first; j < last; ++j) to[j] = from[left + j];
        } else {
          std::memcpy(to + first * C, from + (left + first) * C, (last - first) * C * sizeof(T));
        }
        if (last < 3) std::memset(to + last * C, 0, (3 - last) * C * sizeof(T));
      }
    }
  }
}

Tensor unfold(const Tensor& images) {
  const Tensor x = images.contiguous();
  const int64_t B = x.size(0), H = x.size(1), W = x.size(2), C = x.size(3);
  Tensor out = at::empty({B, halved(H), halved(W), 9 * C}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "metamom::unfold", [&] {
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, B * halved(H), 8, [&](int64_t a, int64_t b) { unfold_rows(from, to, a, b, H, W, C); });
  });
  return out;
}

template <typename T>
void fold_rows(const T* g, T* out, int64_t begin, int64_t end, int64_t H, int64_t W, int64_t C) {
  const int64_t oh = halved(H), ow = halved(W);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / H, h = row % H;
    T* to = out + row * W * C;
    // an even row was read by one tap (i = 1), an odd one by two (i = 2 of output o, i = 0 of output o + 1)
    const T* taps[2] = {nullptr, nullptr};
    int64_t rows = 0;
    if (h % 2 == 0) {
      taps[rows++] = g + ((image * oh + h / 2) * ow * 9 + 3) * C;
    } else {
      taps[rows++] = g + ((image * oh + h / 2) * ow * 9 + 6) * C;
      if (h / 2 + 1 < oh) taps[rows++] = g + (image * oh + h / 2 + 1) * ow * 9 * C;
    }
    for (int64_t w = 0; w < W; ++w, to += C) {
      const T* parts[4];
      int64_t n = 0;
      for (int64_t r = 0; r < rows; ++r) {
        const T* at = taps[r] + (w / 2) * 9 * C;
        if (w % 2 == 0) {
          parts[n++] = at + C;
        } else {
          parts[n++] = at + 2 * C;
          if (w / 2 + 1 < ow) parts[n++] = at + 9 * C;
        }
      }
      switch (n) {
        case 1: std::memcpy(to, parts[0], C * sizeof(T)); break;
        case 2: for (int64_t c = 0; c < C; ++c) to[c] = parts[0][c] + parts[1][c]; break;
        default: for (int64_t c = 0; c < C; ++c) to[c] = (parts[0][c] + parts[1][c]) + (parts[2][c] + parts[3][c]);
      }
    }
  }
}

Tensor fold(const Tensor& patches, int64_t H, int64_t W) {
  const Tensor g = patches.contiguous();
  const int64_t B = g.size(0), C = g.size(3) / 9;
  Tensor out = at::empty({B, H, W, C}, g.options());
  AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "metamom::fold", [&] {
    const scalar_t* from = g.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, B * H, 8, [&](int64_t a, int64_t b) { fold_rows(from, to, a, b, H, W, C); });
  });
  return out;
}

// Calls body(group, first channel, number of channels) for every group and every WIDTH channels, on all threads.
template <typename Body>
void for_channels(int64_t G, int64_t C, const Body& body) {
  const int64_t blocks = (C + WIDTH - 1) / WIDTH;
  at::parallel_for(0, G * blocks, 1, [&](int64_t a, int64_t b) {
    for (int64_t unit = a; unit < b; ++unit) {
      const int64_t first = unit % blocks * WIDTH;
      body(unit / blocks, first, std::min(WIDTH, C - first));
    }
  });
}

// Column sums of N terms over M rows: term(row, channel, sums) adds to sums[0..N).
template <int N, typename T, typename Term>
void column_sums(int64_t M, int64_t width, T (*total)[WIDTH], const Term& term) {
  for (int n = 0; n < N; ++n) std::fill(total[n], total[n] + WIDTH, T(0));
  for (int64_t begin = 0; begin < M; begin += RUN) {
    T run[N][WIDTH] = {};
    const int64_t end = std::min(M, begin + RUN);
    if (width == WIDTH) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t c = 0; c < WIDTH; ++c) term(i, c, run);
    } else {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t c = 0; c < width; ++c) term(i, c, run);
    }
    for (int n = 0; n < N; ++n)
      for (int64_t c = 0; c < WIDTH; ++c) total[n][c] += run[n][c];
  }
}

// Where ReLU, whose output is z, lets nothing through; a NaN lets all through, as in PyTorch.
template <typename T>
bool off(T z) {
  return z <= T(0);
}

std::tuple<Tensor, Tensor, Tensor> norm_relu(
    const Tensor& inputs, const Tensor& gain, const Tensor& shift, double eps) {
  const Tensor y = inputs.contiguous(), gains = gain.contiguous(), shifts = shift.contiguous();
  const int64_t G = y.size(0), M = y.size(1), C = y.size(2);
  Tensor z = at::empty_like(y), mean = at::empty({G, C}, y.options()), rstd = at::empty({G, C}, y.options());
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "metamom::norm_relu", [&] {
    using T = scalar_t;
    const T *py = y.const_data_ptr<T>(), *pg = gains.const_data_ptr<T>(), *pb = shifts.const_data_ptr<T>();
    T *pz = z.mutable_data_ptr<T>(), *pm = mean.mutable_data_ptr<T>(), *pr = rstd.mutable_data_ptr<T>();
    for_channels(G, C, [&](int64_t group, int64_t first, int64_t width) {
      const T* yy = py + group * M * C + first;
      T* zz = pz + group * M * C + first;
      const int64_t at = group * C + first;
      T sums[1][WIDTH], m[WIDTH] = {}, scale[WIDTH] = {}, b[WIDTH] = {};
      column_sums<1>(M, width, sums, [=](int64_t i, int64_t c, auto& s) { s[0][c] += yy[i * C + c]; });
      for (int64_t c = 0; c < width; ++c) m[c] = sums[0][c] / M;
      column_sums<1>(M, width, sums, [=, &m](int64_t i, int64_t c, auto& s) {
        const T d = yy[i * C + c] - m[c];
        s[0][c] += d * d;
      });
      for (int64_t c = 0; c < width; ++c) {
        const T r = T(1) / std::sqrt(sums[0][c] / M + T(eps));
        pm[at + c] = m[c];
        pr[at + c] = r;
        scale[c] = r * pg[at + c];
        b[c] = pb[at + c];
      }
      for (int64_t i = 0; i < M; ++i)
        for (int64_t c = 0; c < width; ++c) {
          const T value = (yy[i * C + c] - m[c]) * scale[c] + b[c];
          zz[i * C + c] = value < T(0) ? T(0) : value;  // NaN stays NaN
        }
    });
  });
  return {z, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> norm_relu_backward(
    const Tensor& cotangent, const Tensor& inputs, const Tensor& gain, const Tensor& output, const Tensor& mean,
    const Tensor& rstd) {
  const Tensor dz = cotangent.contiguous(), y = inputs.contiguous(), gains = gain.contiguous(),
               z = output.contiguous(), means = mean.contiguous(), rstds = rstd.contiguous();
  const int64_t G = y.size(0), M = y.size(1), C = y.size(2);
  Tensor dy = at::empty_like(y), dgain = at::empty({G, C}, y.options()), dshift = at::empty({G, C}, y.options());
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "metamom::norm_relu_backward", [&] {
    using T = scalar_t;
    const T *pdz = dz.const_data_ptr<T>(), *py = y.const_data_ptr<T>(), *pz = z.const_data_ptr<T>();
    const T *pg = gains.const_data_ptr<T>(), *pm = means.const_data_ptr<T>(), *pr = rstds.const_data_ptr<T>();
    T *pdy = dy.mutable_data_ptr<T>(), *pdg = dgain.mutable_data_ptr<T>(), *pdb = dshift.mutable_data_ptr<T>();
    for_channels(G, C, [&](int64_t group, int64_t first, int64_t width) {
      const int64_t start = group * M * C + first, at = group * C + first;
      const T *yy = py + start, *zz = pz + start, *ddz = pdz + start;
      T* ddy = pdy + start;
      T sums[2][WIDTH], m[WIDTH] = {}, r[WIDTH] = {}, scale[WIDTH] = {}, slope[WIDTH] = {}, level[WIDTH] = {};
      for (int64_t c = 0; c < width; ++c) m[c] = pm[at + c], r[c] = pr[at + c];
      column_sums<2>(M, width, sums, [=, &m, &r](int64_t i, int64_t c, auto& s) {
        const T e = off(zz[i * C + c]) ? T(0) : ddz[i * C + c];
        s[0][c] += e;
        s[1][c] += e * ((yy[i * C + c] - m[c]) * r[c]);
      });
      for (int64_t c = 0; c < width; ++c) {
        pdb[at + c] = sums[0][c];
        pdg[at + c] = sums[1][c];
        scale[c] = pg[at + c] * r[c];
        level[c] = sums[0][c] / M;
        slope[c] = sums[1][c] / M * r[c];
      }
      for (int64_t i = 0; i < M; ++i)
        for (int64_t c = 0; c < width; ++c) {
          const T e = off(zz[i * C + c]) ? T(0) : ddz[i * C + c];
          ddy[i * C + c] = scale[c] * (e - level[c] - (yy[i * C + c] - m[c]) * slope[c]);
        }
    });
  });
  return {dy, dgain, dshift};
}

std::tuple<Tensor, Tensor, Tensor> norm_relu_double_backward(
    const Tensor& cot_dy, const Tensor& cot_dgain, const Tensor& cot_dshift, const Tensor& cotangent,
    const Tensor& inputs, const Tensor& gain, const Tensor& output, const Tensor& mean, const Tensor& rstd) {
  const Tensor Y = cot_dy.contiguous(), A = cot_dgain.contiguous(), S = cot_dshift.contiguous(),
               dz = cotangent.contiguous(), y = inputs.contiguous(), gains = gain.contiguous(),
               z = output.contiguous(), means = mean.contiguous(), rstds = rstd.contiguous();
  const int64_t G = y.size(0), M = y.size(1), C = y.size(2);
  Tensor out_dz = at::empty_like(y), out_y = at::empty_like(y), out_gain = at::empty({G, C}, y.options());
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "metamom::norm_relu_double_backward", [&] {
    using T = scalar_t;
    const T *pY = Y.const_data_ptr<T>(), *pA = A.const_data_ptr<T>(), *pS = S.const_data_ptr<T>();
    const T *pdz = dz.const_data_ptr<T>(), *py = y.const_data_ptr<T>(), *pz = z.const_data_ptr<T>();
    const T *pg = gains.const_data_ptr<T>(), *pm = means.const_data_ptr<T>(), *pr = rstds.const_data_ptr<T>();
    T *odz = out_dz.mutable_data_ptr<T>(), *oy = out_y.mutable_data_ptr<T>(), *og = out_gain.mutable_data_ptr<T>();
    for_channels(G, C, [&](int64_t group, int64_t first, int64_t width) {
      const int64_t start = group * M * C + first, at = group * C + first;
      const T *YY = pY + start, *yy = py + start, *zz = pz + start, *ddz = pdz + start;
      T *to_dz = odz + start, *to_y = oy + start;
      T sums[5][WIDTH], m[WIDTH] = {}, r[WIDTH] = {};
      for (int64_t c = 0; c < width; ++c) m[c] = pm[at + c], r[c] = pr[at + c];
      column_sums<5>(M, width, sums, [=, &m, &r](int64_t i, int64_t c, auto& s) {
        const T x = (yy[i * C + c] - m[c]) * r[c], e = off(zz[i * C + c]) ? T(0) : ddz[i * C + c];
        const T v = YY[i * C + c];
        s[0][c] += v;
        s[1][c] += v * x;
        s[2][c] += v * e;
        s[3][c] += e;
        s[4][c] += e * x;
      });
      // out_dz = mask (p Y + q x + s), out_y = h Y + k e + l + n x: see reference.py for the derivation
      T p[WIDTH] = {}, q[WIDTH] = {}, s[WIDTH] = {}, h[WIDTH] = {}, k[WIDTH] = {}, l[WIDTH] = {}, n[WIDTH] = {};
      for (int64_t c = 0; c < width; ++c) {
        const T v = sums[0][c], vx = sums[1][c] / M, ve = sums[2][c], e = sums[3][c], ex = sums[4][c] / M;
        const T gr = pg[at + c] * r[c], a = pA[at + c];
        const T inner = ve - v * e / M - vx * ex * M;  // <Y, P e>
        og[at + c] = r[c] * inner;
        p[c] = gr;
        q[c] = a - gr * vx;
        s[c] = pS[at + c] - gr * v / M;
        const T on_v = -gr * ex, on_e = a - gr * vx;
        const T level = (on_v * v + on_e * e) / M, slope = on_v * vx + on_e * ex;
        h[c] = r[c] * on_v;
        k[c] = r[c] * on_e;
        l[c] = -r[c] * level;
        n[c] = -r[c] * (slope + gr * inner / M);
      }
      for (int64_t i = 0; i < M; ++i)
        for (int64_t c = 0; c < width; ++c) {
          const T x = (yy[i * C + c] - m[c]) * r[c], v = YY[i * C + c];
          const bool on = !off(zz[i * C + c]);
          to_dz[i * C + c] = on ? p[c] * v + q[c] * x + s[c] : T(0);
          to_y[i * C + c] = h[c] * v + (on ? k[c] * ddz[i * C + c] : T(0)) + l[c] + n[c] * x;
        }
    });
  });
  return {out_dz, out_y, out_gain};
}

// Normalisation of images [G, N, H, W, C] with an activation function (the factor `slope` below 0) and a pooling.
// Sums are taken image by image on all threads, and then in order, so that they do not depend on the number of threads.
struct Sizes {
  int64_t G, N, HW, C;

  explicit Sizes(const Tensor& y) : G(y.size(0)), N(y.size(1)), HW(y.size(2) * y.size(3)), C(y.size(4)) {}
};

// Calls body(image) for all images of all groups.
template <typename Body>
void for_images(const Sizes& s, const Body& body) {
  at::parallel_for(0, s.G * s.N, 1, [&](int64_t a, int64_t b) {
    for (int64_t image = a; image < b; ++image) body(image);
  });
}

// Column sums over the rows of one image, for any number of channels: out[n * C + c].
template <int N, typename T, typename Term>
void image_sums(int64_t rows, int64_t C, T* out, const Term& term) {
  for (int64_t first = 0; first < C; first += WIDTH) {
    const int64_t width = std::min(WIDTH, C - first);
    T sums[N][WIDTH];
    column_sums<N>(rows, width, sums, [&, first](int64_t i, int64_t c, auto& run) { term(i, c, first + c, run); });
    for (int n = 0; n < N; ++n) std::copy(sums[n], sums[n] + width, out + n * C + first);
  }
}

// Adds the sums [N, K, C] of a group's images, in order: [K, C].
template <typename T>
void add_images(const Sizes& s, int64_t K, const T* of_images, T* out) {
  std::fill(out, out + K * s.C, T(0));
  for (int64_t image = 0; image < s.N; ++image)
    for (int64_t i = 0; i < K * s.C; ++i) out[i] += of_images[image * K * s.C + i];
}

std::tuple<Tensor, Tensor, Tensor> norm(const Tensor& inputs, const Tensor& gain, const Tensor& shift, double eps) {
  const Tensor y = inputs.contiguous(), gains = gain.contiguous(), shifts = shift.contiguous();
  const Sizes s(y);
  Tensor z = at::empty_like(y), mean = at::empty({s.G, s.C}, y.options()), rstd = at::empty({s.G, s.C}, y.options());
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "metamom::norm", [&] {
    using T = scalar_t;
    const T *py = y.const_data_ptr<T>(), *pg = gains.const_data_ptr<T>(), *pb = shifts.const_data_ptr<T>();
    T *pz = z.mutable_data_ptr<T>(), *pm = mean.mutable_data_ptr<T>(), *pr = rstd.mutable_data_ptr<T>();
    const T M = s.N * s.HW;
    std::vector<T> sums(s.G * s.N * s.C);
    for_images(s, [&](int64_t image) {
      const T* yy = py + image * s.HW * s.C;
      image_sums<1>(s.HW, s.C, sums.data() + image * s.C,
                    [=, &s](int64_t i, int64_t at, int64_t c, auto& run) { run[0][at] += yy[i * s.C + c]; });
    });
    for (int64_t g = 0; g < s.G; ++g) {
      add_images(s, 1, sums.data() + g * s.N * s.C, pm + g * s.C);
      for (int64_t c = 0; c < s.C; ++c) pm[g * s.C + c] /= M;
    }
    for_images(s, [&](int64_t image) {
      const T *yy = py + image * s.HW * s.C, *m = pm + image / s.N * s.C;
      image_sums<1>(s.HW, s.C, sums.data() + image * s.C, [=, &s](int64_t i, int64_t at, int64_t c, auto& run) {
        const T d = yy[i * s.C + c] - m[c];
        run[0][at] += d * d;
      });
    });
    for (int64_t g = 0; g < s.G; ++g) {
      add_images(s, 1, sums.data() + g * s.N * s.C, pr + g * s.C);
      for (int64_t c = 0; c < s.C; ++c) pr[g * s.C + c] = T(1) / std::sqrt(pr[g * s.C + c] / M + T(eps));
    }
    for_images(s, [&](int64_t image) {
      const T *yy = py + image * s.HW * s.C, *m = pm + image / s.N * s.C, *r = pr + image / s.N * s.C;
      const T *gg = pg + image / s.N * s.C, *b = pb + image / s.N * s.C;
      T* zz = pz + image * s.HW * s.C;
      for (int64_t i = 0; i < s.HW; ++i)
        for (int64_t c = 0; c < s.C; ++c) zz[i * s.C + c] = (yy[i * s.C + c] - m[c]) * (r[c] * gg[c]) + b[c];
    });
  });
  return {z, mean, rstd};
}

template <typename T>
T activated(T z, T slope) {
  return z < T(0) ? slope * z : z;  // NaN stays NaN
}

// Both compute the normalised activations again instead of reading them, so that those are never written.
Tensor activate(const Tensor& inputs, const Tensor& gain, const Tensor& shift, const Tensor& mean, const Tensor& rstd,
                const Tensor&, double slope) {
  const Tensor y = inputs.contiguous(), gains = gain.contiguous(), shifts = shift.contiguous(),
               means = mean.contiguous(), rstds = rstd.contiguous();
  const Sizes s(y);
  Tensor z = at::empty_like(y);
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "metamom::activate", [&] {
    using T = scalar_t;
    const T *py = y.const_data_ptr<T>(), *pg = gains.const_data_ptr<T>(), *pb = shifts.const_data_ptr<T>();
    const T *pm = means.const_data_ptr<T>(), *pr = rstds.const_data_ptr<T>();
    T* pz = z.mutable_data_ptr<T>();
    for_images(s, [&](int64_t image) {
      const int64_t at = image / s.N * s.C;
      const T *yy = py + image * s.HW * s.C, *m = pm + at, *r = pr + at, *g = pg + at, *b = pb + at;
      T* zz = pz + image * s.HW * s.C;
      for (int64_t i = 0; i < s.HW; ++i)
        for (int64_t c = 0; c < s.C; ++c)
          zz[i * s.C + c] = activated<T>((yy[i * s.C + c] - m[c]) * (r[c] * g[c]) + b[c], T(slope));
    });
  });
  return z;
}

int64_t pooled_size(int64_t size, int64_t k, int64_t step, int64_t pad, int64_t dilation, bool ceil_mode) {
  const int64_t span = size + 2 * pad - dilation * (k - 1) - 1 + (ceil_mode ? step - 1 : 0);
  int64_t out = span / step + 1;
  if (ceil_mode && (out - 1) * step >= size + pad) --out;  // the last window starts inside the image, as in PyTorch
  return out;
}

std::tuple<Tensor, Tensor> pool(const Tensor& inputs, const Tensor& gain, const Tensor& shift, const Tensor& mean,
                                const Tensor& rstd, const Tensor&, double slope, at::IntArrayRef windows,
                                bool ceil_mode) {
  const Tensor y = inputs.contiguous(), gains = gain.contiguous(), shifts = shift.contiguous(),
               means = mean.contiguous(), rstds = rstd.contiguous();
  const Sizes s(y);
  const int64_t H = y.size(2), W = y.size(3), kh = windows[0], kw = windows[1], down = windows[2], right = windows[3],
                top = windows[4], left = windows[5], below = windows[6], beside = windows[7];
  const int64_t oh = pooled_size(H, kh, down, top, below, ceil_mode),
                ow = pooled_size(W, kw, right, left, beside, ceil_mode);
  TORCH_CHECK(oh > 0 && ow > 0, "max_pool2d: the output would be empty");
  Tensor z = at::empty({s.G, s.N, oh, ow, s.C}, y.options());
  Tensor places = at::empty({s.G, s.N, oh, ow, s.C}, y.options().dtype(at::kLong));
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "metamom::pool", [&] {
    using T = scalar_t;
    const T *py = y.const_data_ptr<T>(), *pg = gains.const_data_ptr<T>(), *pb = shifts.const_data_ptr<T>();
    const T *pm = means.const_data_ptr<T>(), *pr = rstds.const_data_ptr<T>();
    T* pz = z.mutable_data_ptr<T>();
    int64_t* pp = places.mutable_data_ptr<int64_t>();
    for_images(s, [&](int64_t image) {
      const int64_t at = image / s.N * s.C;
      for (int64_t first = 0; first < s.C; first += WIDTH) {
        const int64_t width = std::min(WIDTH, s.C - first);
        const T *yy = py + image * s.HW * s.C + first;
        T m[WIDTH] = {}, scale[WIDTH] = {}, b[WIDTH] = {};
        for (int64_t c = 0; c < width; ++c) {
          m[c] = pm[at + first + c];
          scale[c] = pr[at + first + c] * pg[at + first + c];
          b[c] = pb[at + first + c];
        }
        for (int64_t o = 0; o < oh * ow; ++o) {
          T best[WIDTH];
          int64_t place[WIDTH];
          bool begun = false;
          for (int64_t i = 0; i < kh; ++i) {
            const int64_t h = o / ow * down - top + i * below;
            if (h < 0 || h >= H) continue;
            for (int64_t j = 0; j < kw; ++j) {
              const int64_t w = o % ow * right - left + j * beside;
              if (w < 0 || w >= W) continue;
              const T* row = yy + (h * W + w) * s.C;
              const int64_t here = h * W + w;
              for (int64_t c = 0; c < width; ++c) {
                const T value = activated<T>((row[c] - m[c]) * scale[c] + b[c], T(slope));
                const bool better = !begun || value > best[c] || std::isnan(value);
                best[c] = better ? value : best[c];
                place[c] = better ? here : place[c];
              }
              begun = true;
            }
          }
          const int64_t to = (image * oh * ow + o) * s.C + first;
          std::copy(best, best + width, pz + to);
          std::copy(place, place + width, pp + to);
        }
      }
    });
  });
  return {z, places};
}

// The rows of one image that a cotangent has: all of them, or the places that a pooling chose.
template <typename T, bool masked, bool pooled>
struct Passed {
  const T* cotangent;
  const T* z;
  const int64_t* places;
  int64_t C;
  T slope;

  T mask(T value, int64_t i, int64_t c) const {
    if constexpr (!masked) return value;
    const T below = slope == T(0) ? T(0) : slope * value;  // 0, also of an infinite value
    return off(z[i * C + c]) ? below : value;
  }
  T e(int64_t i, int64_t c) const { return mask(cotangent[i * C + c], i, c); }
  int64_t row(int64_t i, int64_t c) const {
    if constexpr (pooled) return places[i * C + c];
    return i;
  }
};

// Calls body with constants in place of two run-time conditions.
template <typename Body>
void with_constants(bool masked, bool pooled, const Body& body) {
  using yes = std::true_type;
  using no = std::false_type;
  if (masked && pooled) return body(yes(), yes());
  if (masked) return body(yes(), no());
  if (pooled) return body(no(), yes());
  body(no(), no());
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(
    const Tensor& cotangent, const Tensor& inputs, const Tensor& gain, const Tensor& mean, const Tensor& rstd,
    const std::optional<Tensor>& output, const std::optional<Tensor>& chosen, double slope) {
  const Tensor dz = cotangent.contiguous(), y = inputs.contiguous(), gains = gain.contiguous(),
               means = mean.contiguous(), rstds = rstd.contiguous();
  const Tensor z = output.has_value() ? output->contiguous() : Tensor();
  const Tensor places = chosen.has_value() ? chosen->contiguous() : Tensor();
  const Sizes s(y);
  const int64_t P = dz.size(2) * dz.size(3);
  Tensor dy = at::empty_like(y), dgain = at::empty({s.G, s.C}, y.options()), dshift = at::empty({s.G, s.C}, y.options());
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "metamom::norm_backward", [&] {
    using T = scalar_t;
    const T *pdz = dz.const_data_ptr<T>(), *py = y.const_data_ptr<T>();
    const T *pz = z.defined() && slope != 1.0 ? z.const_data_ptr<T>() : nullptr;
    const int64_t* pp = places.defined() ? places.const_data_ptr<int64_t>() : nullptr;
    const T *pg = gains.const_data_ptr<T>(), *pm = means.const_data_ptr<T>(), *pr = rstds.const_data_ptr<T>();
    T *pdy = dy.mutable_data_ptr<T>(), *pdg = dgain.mutable_data_ptr<T>(), *pdb = dshift.mutable_data_ptr<T>();
    const T M = s.N * s.HW;
    with_constants(pz != nullptr, pp != nullptr, [&](auto masked, auto pooled) {
    using Rows = Passed<T, masked.value, pooled.value>;
    const auto passed = [&](int64_t image) {
      const int64_t at = image * P * s.C;
      return Rows{pdz + at, masked.value ? pz + at : nullptr, pooled.value ? pp + at : nullptr, s.C, T(slope)};
    };
    std::vector<T> sums(s.G * s.N * 2 * s.C), total(2 * s.C), scale(s.G * s.C), on_y(s.G * s.C), level(s.G * s.C);
    for_images(s, [&](int64_t image) {
      const T *yy = py + image * s.HW * s.C, *m = pm + image / s.N * s.C, *r = pr + image / s.N * s.C;
      const Rows p = passed(image);
      image_sums<2>(P, s.C, sums.data() + image * 2 * s.C, [&](int64_t i, int64_t at, int64_t c, auto& run) {
        const T e = p.e(i, c);
        run[0][at] += e;
        run[1][at] += e * ((yy[p.row(i, c) * s.C + c] - m[c]) * r[c]);
      });
    });
    for (int64_t g = 0; g < s.G; ++g) {
      add_images(s, 2, sums.data() + g * s.N * 2 * s.C, total.data());
      for (int64_t c = 0; c < s.C; ++c) {
        const int64_t at = g * s.C + c;
        pdb[at] = total[c];
        pdg[at] = total[s.C + c];
        scale[at] = pg[at] * pr[at];
        level[at] = -scale[at] * total[c] / M;
        on_y[at] = -scale[at] * pr[at] * total[s.C + c] / M;
      }
    }
    for_images(s, [&](int64_t image) {
      const int64_t at = image / s.N * s.C;
      const T *yy = py + image * s.HW * s.C, *m = pm + at, *k = scale.data() + at, *l = level.data() + at,
              *n = on_y.data() + at;
      T* to = pdy + image * s.HW * s.C;
      const Rows p = passed(image);
      if constexpr (!pooled.value) {
        for (int64_t i = 0; i < s.HW; ++i)
          for (int64_t c = 0; c < s.C; ++c)
            to[i * s.C + c] = l[c] + n[c] * (yy[i * s.C + c] - m[c]) + k[c] * p.e(i, c);
        return;
      }
      for (int64_t i = 0; i < s.HW; ++i)
        for (int64_t c = 0; c < s.C; ++c) to[i * s.C + c] = l[c] + n[c] * (yy[i * s.C + c] - m[c]);
      for (int64_t i = 0; i < P; ++i)
        for (int64_t c = 0; c < s.C; ++c) to[p.row(i, c) * s.C + c] += k[c] * p.e(i, c);
    });
    });
  });
  return {dy, dgain, dshift};
}

std::tuple<Tensor, Tensor, Tensor> norm_double_backward(
    const Tensor& cot_dy, const Tensor& cot_dgain, const Tensor& cot_dshift, const Tensor& cotangent,
    const Tensor& inputs, const Tensor& gain, const Tensor& mean, const Tensor& rstd,
    const std::optional<Tensor>& output, const std::optional<Tensor>& chosen, double slope) {
  const Tensor V = cot_dy.contiguous(), A = cot_dgain.contiguous(), S = cot_dshift.contiguous(),
               dz = cotangent.contiguous(), y = inputs.contiguous(), gains = gain.contiguous(),
               means = mean.contiguous(), rstds = rstd.contiguous();
  const Tensor z = output.has_value() ? output->contiguous() : Tensor();
  const Tensor places = chosen.has_value() ? chosen->contiguous() : Tensor();
  const Sizes s(y);
  const int64_t P = dz.size(2) * dz.size(3);
  Tensor out_dz = at::empty_like(dz), out_y = at::empty_like(y), out_gain = at::empty({s.G, s.C}, y.options());
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "metamom::norm_double_backward", [&] {
    using T = scalar_t;
    const T *pV = V.const_data_ptr<T>(), *pA = A.const_data_ptr<T>(), *pS = S.const_data_ptr<T>();
    const T *pdz = dz.const_data_ptr<T>(), *py = y.const_data_ptr<T>();
    const T *pz = z.defined() && slope != 1.0 ? z.const_data_ptr<T>() : nullptr;
    const int64_t* pp = places.defined() ? places.const_data_ptr<int64_t>() : nullptr;
    const T *pg = gains.const_data_ptr<T>(), *pm = means.const_data_ptr<T>(), *pr = rstds.const_data_ptr<T>();
    T *odz = out_dz.mutable_data_ptr<T>(), *oy = out_y.mutable_data_ptr<T>(), *og = out_gain.mutable_data_ptr<T>();
    const T M = s.N * s.HW;
    with_constants(pz != nullptr, pp != nullptr, [&](auto masked, auto pooled) {
    using Rows = Passed<T, masked.value, pooled.value>;
    const auto passed = [&](int64_t image) {
      const int64_t at = image * P * s.C;
      return Rows{pdz + at, masked.value ? pz + at : nullptr, pooled.value ? pp + at : nullptr, s.C, T(slope)};
    };
    std::vector<T> sums(s.G * s.N * 5 * s.C), total(5 * s.C), factors(s.G * 7 * s.C);
    for_images(s, [&](int64_t image) {
      const T *vv = pV + image * s.HW * s.C, *yy = py + image * s.HW * s.C;
      const T *m = pm + image / s.N * s.C, *r = pr + image / s.N * s.C;
      const Rows p = passed(image);
      T* to = sums.data() + image * 5 * s.C;
      image_sums<2>(s.HW, s.C, to, [&](int64_t i, int64_t at, int64_t c, auto& run) {
        const T v = vv[i * s.C + c];
        run[0][at] += v;
        run[1][at] += v * ((yy[i * s.C + c] - m[c]) * r[c]);
      });
      image_sums<3>(P, s.C, to + 2 * s.C, [&](int64_t i, int64_t at, int64_t c, auto& run) {
        const int64_t row = p.row(i, c) * s.C + c;
        const T e = p.e(i, c);
        run[0][at] += vv[row] * e;
        run[1][at] += e;
        run[2][at] += e * ((yy[row] - m[c]) * r[c]);
      });
    });
    // to_dz = mask (p v + q x + s), to_y = h v + k e + l + n x: see normalisations.py
    for (int64_t g = 0; g < s.G; ++g) {
      add_images(s, 5, sums.data() + g * s.N * 5 * s.C, total.data());
      T* f = factors.data() + g * 7 * s.C;
      for (int64_t c = 0; c < s.C; ++c) {
        const int64_t at = g * s.C + c;
        const T v = total[c], vx = total[s.C + c] / M, ve = total[2 * s.C + c], e = total[3 * s.C + c],
                ex = total[4 * s.C + c] / M;
        const T r = pr[at], gr = pg[at] * r, a = pA[at];
        const T inner = ve - v * e / M - vx * ex * M;  // <v, P(e)>
        og[at] = r * inner;
        f[c] = gr;
        f[s.C + c] = a - gr * vx;
        f[2 * s.C + c] = pS[at] - gr * v / M;
        const T on_v = -gr * ex, on_e = a - gr * vx;
        f[3 * s.C + c] = r * on_v;
        f[4 * s.C + c] = r * on_e;
        f[5 * s.C + c] = -r * (on_v * v + on_e * e) / M;
        f[6 * s.C + c] = -r * (on_v * vx + on_e * ex + gr * inner / M);
      }
    }
    for_images(s, [&](int64_t image) {
      const T *vv = pV + image * s.HW * s.C, *yy = py + image * s.HW * s.C;
      const T *m = pm + image / s.N * s.C, *r = pr + image / s.N * s.C;
      const T* factor = factors.data() + image / s.N * 7 * s.C;
      const Rows p = passed(image);
      for (int64_t first = 0; first < s.C; first += WIDTH) {  // local copies, which cannot alias what is written
        const int64_t width = std::min(WIDTH, s.C - first);
        T f[9][WIDTH] = {};
        for (int n = 0; n < 7; ++n) std::copy_n(factor + n * s.C + first, width, f[n]);
        std::copy_n(m + first, width, f[7]);
        std::copy_n(r + first, width, f[8]);
        T* __restrict__ to_y = oy + image * s.HW * s.C + first;
        T* __restrict__ to_dz = odz + image * P * s.C + first;
        for (int64_t i = 0; i < s.HW; ++i)
          for (int64_t c = 0; c < width; ++c) {
            const int64_t at = i * s.C + first + c;
            const T v = vv[at], x = (yy[at] - f[7][c]) * f[8][c];
            T sum = f[3][c] * v + f[5][c] + f[6][c] * x;
            if constexpr (!pooled.value) {
              sum += f[4][c] * p.e(i, first + c);
              to_dz[i * s.C + c] = p.mask(f[0][c] * v + f[1][c] * x + f[2][c], i, first + c);
            }
            to_y[i * s.C + c] = sum;
          }
        if constexpr (pooled.value)
          for (int64_t i = 0; i < P; ++i)
            for (int64_t c = 0; c < width; ++c) {
              const int64_t row = p.row(i, first + c) * s.C;
              const T x = (yy[row + first + c] - f[7][c]) * f[8][c];
              to_dz[i * s.C + c] = p.mask(f[0][c] * vv[row + first + c] + f[1][c] * x + f[2][c], i, first + c);
              to_y[row + c] += f[4][c] * p.e(i, first + c);
            }
      }
    });
    });
  });
  return {out_dz, out_y, out_gain};
}

}  // namespace

TORCH_LIBRARY_IMPL(metamom, CPU, m) {
  m.impl("unfold", unfold);
  m.impl("fold", fold);
  m.impl("norm_relu", norm_relu);
  m.impl("norm_relu_backward", norm_relu_backward);
  m.impl("norm_relu_double_backward", norm_relu_double_backward);
  m.impl("norm", norm);
  m.impl("activate", activate);
  m.impl("pool", pool);
  m.impl("norm_backward", norm_backward);
  m.impl("norm_double_backward", norm_double_backward);
}
