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
#include <tuple>

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

}  // namespace

TORCH_LIBRARY_IMPL(metamom, CPU, m) {
  m.impl("unfold", unfold);
  m.impl("fold", fold);
  m.impl("norm_relu", norm_relu);
  m.impl("norm_relu_backward", norm_relu_backward);
  m.impl("norm_relu_double_backward", norm_relu_double_backward);
}
