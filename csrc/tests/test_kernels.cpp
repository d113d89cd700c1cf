// Runs the kernels through their launchers on the emulator (emulator/machine.h) and compares every
// output element with a plain sum in double. No GPU, no CUDA, no torch.
//
//   test_kernels [words...]     only the cases whose name contains every word
//   test_kernels fuzz N [SEED]  N random calls: layouts, tails, ranks, tokens, epilogues, devices
#include <cstdlib>
#include <limits>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "device/activation_codes.cuh"
#include "device/epilogue_math.cuh"
#include "kernel_cases.h"
#include "launch/product_split_sm90.h"

namespace pixelfly {
namespace {

using emulator::Eagerness;

// act(x) and act'(x).
device::ValueAndSlope activated(Activation a, double x) {
  device::ValueAndSlope out{};
  device::dispatch_activation(a, [&](auto tag) {
    out = device::activate_with_slope<decltype(tag)::value, true>(static_cast<float>(x));
  });
  return out;
}

template <typename T>
struct Run {
  const Case& c;
  std::mt19937 rng{20211130};
  LayoutView layout;
  std::vector<int32_t> plan;
  PlanHeader header;
  DeviceInfo device;
  using Slope = device::SlopeOf<T>;
  Tensor<T> x, blocks, u, v, bias, residual, dy;
  Tensor<Slope> slope, x_slope;  // of the layer's output and of its input
  Matrix weight;                 // [n][k], low rank not included
  double tolerance = sizeof(T) == 4 ? 2e-5 : std::is_same_v<T, __half> ? 2e-3 : 1.5e-2;

  explicit Run(const Case& which) : c(which) {
    layout = layout_of(c);
    plan = build_plan(layout);
    header = header_of(c, plan);
    device = {0, c.arch, c.sms, static_cast<int32_t>(emulator::kSharedLimit)};
    const int n = c.n(), k = c.k(), b = c.block, r = c.rank;
    x = Tensor<T>::random(c.tokens, k, 1, rng);
    blocks = Tensor<T>::random(int64_t{layout.nnz()} * b, b, 0.1, rng);
    if (r > 0) {
      u = Tensor<T>::random(n, r, 0.3, rng);
      v = Tensor<T>::random(r, k, 0.1, rng);
    }
    bias = Tensor<T>::random(1, n, 1, rng);
    residual = Tensor<T>::random(c.tokens, n, 1, rng);
    dy = Tensor<T>::random(c.tokens, n, 1, rng);
    slope = random_slopes(n);
    x_slope = random_slopes(k);
    if (c.nan) bias.set(0, n / 2, NAN);
    weight = zeros(n, k);
    for (int32_t q = 0; q < layout.nnz(); ++q) {
      for (int i = 0; i < b; ++i) {
        for (int j = 0; j < b; ++j) {
          const int row = layout.row_idx[q] * b + i, col = layout.col_idx[q] * b + j;
          if (row < n && col < k) weight[row][col] = blocks.at(int64_t{q} * b + i, j);
        }
      }
    }
  }

  Tensor<Slope> random_slopes(int features) {
    auto t = Tensor<Slope>::uniform(c.tokens, features, -0.13, 1.13, rng);
    for (int i = 0; c.nan && i < c.tokens; i += 7) t.set(i, (i * 37 + 5) % features, NAN);
    return t;
  }

  static constexpr DType dtype() {
    return sizeof(T) == 4                     ? DType::kFloat32
           : std::is_same_v<T, __nv_bfloat16> ? DType::kBFloat16
                                              : DType::kFloat16;
  }

  // A product of `in` by the blocks, with t = in times factor_in and its product with factor.
  ProductParams params(bool transposed, Tensor<T>& in, Tensor<T>& factor_in, Tensor<T>& factor,
                       Tensor<T>& t, Tensor<T>& out) {
    ProductParams p{};
    p.dtype = dtype();
    p.transposed = transposed;
    p.tokens = c.tokens;
    p.in_features = static_cast<int32_t>(in.cols);
    p.out_features = static_cast<int32_t>(out.cols);
    p.x = in.pointer();
    p.x_stride = in.cols;
    p.blocks = blocks.pointer();
    if (c.rank > 0) {
      p.factor_in = factor_in.pointer();
      p.factor_in_stride = factor_in.cols;
      p.factor = factor.pointer();
      p.factor_stride = factor.cols;
      p.t = t.pointer();
      p.t_stride = t.cols;
    }
    p.y = out.pointer();
    p.y_stride = out.cols;
    p.header = &header;
    p.plan = plan.data();
    return p;
  }

  // With a workspace that nobody wrote.
  void launch(ProductParams p) {
    if (c.warpgroups > 0) {
      check(launch_low_rank(low_rank_of(p), device, nullptr));
      check(launch_product_split_sm90(p, {c.warpgroups, c.cluster, c.long_only}, device, nullptr));
      return;
    }
    std::vector<float> workspace((product_workspace(p, device) + 3) / 4, NAN);
    p.workspace = workspace.empty() ? nullptr : workspace.data();
    check(launch_product(p, device, nullptr));
  }

  void forward() {
    const int n = c.n(), k = c.k(), r = c.rank, tokens = c.tokens;
    Tensor<T> y(tokens, n), t(tokens, r);
    Tensor<Slope> slope_out(tokens, n);
    ProductParams p = params(false, x, v, u, t, y);
    p.bias = bias.pointer();
    if (c.residual) {
      p.residual = residual.pointer();
      p.residual_stride = n;
    }
    p.activation = c.activation;
    if (c.save_slope) {
      p.slope_out = slope_out.pointer();
      p.slope_out_stride = slope_out.stride;
    }
    launch(p);

    Matrix z = product(
        tokens, n, k, [&](int i, int l) { return x.at(i, l); },
        [&](int j, int l) { return weight[j][l]; });
    if (r > 0) {
      const Matrix want = product(
          tokens, r, k, [&](int i, int l) { return x.at(i, l); },
          [&](int j, int l) { return v.at(j, l); });
      compare(c, "t", t, want, tolerance);
      const Matrix low = product(
          tokens, n, r, [&](int i, int l) { return t.at(i, l); },
          [&](int j, int l) { return u.at(j, l); });
      for (int i = 0; i < tokens; ++i) {
        for (int j = 0; j < n; ++j) z[i][j] += low[i][j];
      }
    }
    Matrix want = z, want_slope = z;
    for (int i = 0; i < tokens; ++i) {
      for (int j = 0; j < n; ++j) {
        const auto exact = activated(c.activation, z[i][j] + bias.at(0, j));
        want[i][j] = exact.value + (c.residual ? residual.at(i, j) : 0);
        want_slope[i][j] = exact.slope;
      }
    }
    compare(c, "y", y, want, tolerance);
    if (c.save_slope) compare(c, "the slope", slope_out, want_slope, tolerance);
  }

  // dz from dy and a slope, which for ReLU may also be any tensor of T.
  template <typename S>
  Tensor<T> activation_grad(Tensor<S>& given, DType given_dtype) {
    Tensor<T> dz(c.tokens, c.n());
    const bool relu = c.activation == Activation::kRelu;
    const ActivationGradParams a{dtype(),      given_dtype,  relu,  c.tokens,
                                 c.n(),        dy.pointer(), c.n(), given.pointer(),
                                 given.stride, dz.pointer(), c.n()};
    check(launch_activation_grad(a, device, nullptr));
    Matrix want = zeros(c.tokens, c.n());
    for (int i = 0; i < c.tokens; ++i) {
      for (int j = 0; j < c.n(); ++j) {
        const double s = given.at(i, j);
        want[i][j] = dy.at(i, j) * (relu ? !(s <= 0) : s);
      }
    }
    compare(c, "dz", dz, want, tolerance);
    return dz;
  }

  void backward() {
    const int n = c.n(), k = c.k(), r = c.rank, tokens = c.tokens;
    Tensor<T> dz = dy;
    if (c.activation == Activation::kRelu) activation_grad(residual, dtype());
    if (c.activation != Activation::kNone) dz = activation_grad(slope, slope_dtype(dtype()));
    if (c.nan) dz = dy;  // products would spread it
    Tensor<T> dx(tokens, k), s(tokens, r);
    ProductParams p = params(true, dz, u, v, s, dx);
    const bool through = c.activation != Activation::kNone;  // as if x came from the activation
    if (through) {
      p.slope = x_slope.pointer();
      p.slope_stride = x_slope.stride;
    }
    launch(p);
    Matrix want = product(
        tokens, k, n, [&](int i, int l) { return dz.at(i, l); },
        [&](int j, int l) { return weight[l][j]; });
    if (r > 0) {
      const Matrix s_want = product(
          tokens, r, n, [&](int i, int l) { return dz.at(i, l); },
          [&](int j, int l) { return u.at(l, j); });
      compare(c, "s", s, s_want, tolerance);
      const Matrix low = product(
          tokens, k, r, [&](int i, int l) { return s.at(i, l); },
          [&](int j, int l) { return v.at(l, j); });
      for (int i = 0; i < tokens; ++i) {
        for (int j = 0; j < k; ++j) want[i][j] += low[i][j];
      }
    }
    for (int i = 0; through && i < tokens; ++i) {
      for (int j = 0; j < k; ++j) want[i][j] *= x_slope.at(i, j);
    }
    compare(c, "dx", dx, want, tolerance);

    weight_gradients<T>(dz, s);
    if (!std::is_same_v<T, float>) weight_gradients<float>(dz, s);
  }

  // Gradients in type U, as under autocast they are fp32 beside 16-bit operands.
  template <typename U>
  void weight_gradients(Tensor<T>& dz, Tensor<T>& s) {
    const int n = c.n(), k = c.k(), r = c.rank, tokens = c.tokens, b = c.block;
    Tensor<U> dblocks(int64_t{layout.nnz()} * b, b), du(n, r), dv(r, k), dbias(1, n);
    Tensor<T> t = r > 0 ? Tensor<T>::random(tokens, r, 1, rng) : Tensor<T>(tokens, 0);
    WeightGradParams g{};
    g.dtype = dtype();
    g.grad_dtype = std::is_same_v<U, T> ? dtype() : DType::kFloat32;
    g.tokens = tokens;
    g.in_features = k;
    g.out_features = n;
    g.dz = dz.pointer();
    g.dz_stride = n;
    g.x = x.pointer();
    g.x_stride = k;
    if (r > 0) {
      g.t = t.pointer();
      g.s = s.pointer();
      g.t_stride = g.s_stride = r;
      g.du = du.pointer();
      g.dv = dv.pointer();
    }
    g.dblocks = dblocks.pointer();
    g.dbias = dbias.pointer();
    // Either list of chunks, whichever the launcher would choose.
    PlanHeader either = header;
    if (std::is_same_v<U, float>) {
      either.grad.few = {};
    } else if (either.grad.few.num_chunks > 0) {
      either.grad.many = either.grad.few;
    }
    g.header = &either;
    g.plan = plan.data();
    std::vector<float> workspace(weight_grad_workspace(g, device) / sizeof(float) + 1, NAN);
    g.workspace = workspace.data();
    check(launch_weight_grad(g, device, nullptr));

    const Matrix all = product(
        n, k, tokens, [&](int i, int l) { return dz.at(l, i); },
        [&](int j, int l) { return x.at(l, j); });
    Matrix blocks_want = zeros(int64_t{layout.nnz()} * b, b);
    for (int32_t q = 0; q < layout.nnz(); ++q) {
      for (int i = 0; i < b; ++i) {
        for (int j = 0; j < b; ++j) {
          const int row = layout.row_idx[q] * b + i, col = layout.col_idx[q] * b + j;
          if (row < n && col < k) blocks_want[q * b + i][j] = all[row][col];
        }
      }
    }
    compare(c, "dblocks", dblocks, blocks_want, tolerance);
    Matrix bias_want = zeros(1, n);
    for (int j = 0; j < n; ++j) {
      for (int l = 0; l < tokens; ++l) bias_want[0][j] += dz.at(l, j);
    }
    compare(c, "dbias", dbias, bias_want, tolerance);
    if (r > 0) {
      compare(c, "du", du,
              product(
                  n, r, tokens, [&](int i, int l) { return dz.at(l, i); },
                  [&](int j, int l) { return t.at(l, j); }),
              tolerance);
      compare(c, "dv", dv,
              product(
                  r, k, tokens, [&](int i, int l) { return s.at(l, i); },
                  [&](int j, int l) { return x.at(l, j); }),
              tolerance);
    }
  }
};

template <typename T>
void run(const Case& c) {
  setenv("PIXELFLY_KERNEL", c.path, 1);
  Run<T> r(c);
  r.forward();
  r.backward();
}

// The 16-bit kernels' GELU and its derivative against erf in double.
void check_gelu() {
  const auto gelu = device::activate_with_slope<Activation::kGelu, false>;
  double worst = 0;
  for (int i = -120000; i <= 120000; ++i) {
    const double x = static_cast<float>(i * 1e-4), phi = 0.5 * std::erfc(-x / std::sqrt(2.0));
    const double bell = std::exp(-x * x / 2) / std::sqrt(2 * std::acos(-1.0));
    const auto [value, slope] = gelu(static_cast<float>(x));
    worst = std::max({worst, std::fabs(value - x * phi), std::fabs(slope - phi - x * bell)});
  }
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const auto most = gelu(kInfinity), least = gelu(-kInfinity), nan = gelu(NAN);
  const bool ends = most.value == kInfinity && most.slope == 1 &&
                    std::fabs(least.value) + std::fabs(least.slope) < 1e-12 &&
                    std::isnan(nan.value) && std::isnan(nan.slope);
  if (worst < 4e-7 && ends) return;
  ++g_failures;
  std::printf("FAILED gelu: off by %.1e\n", worst);
}

// The codes of GELU's slopes, formed two at a time in fp16, and the values beside them.
void check_gelu_codes() {
  const auto gelu = device::activate_with_slope<Activation::kGelu, false>;
  double worst = 0;
  bool good = true;
  auto code = [&](float x, int place) {
    float pair[2] = {1.f, 1.f};
    pair[place] = x;
    const uint32_t codes = device::activate_with_codes<Activation::kGelu>(pair[0], pair[1]);
    const float value = gelu(x).value;
    good &= pair[place] == value || std::isnan(value);
    good &= std::fabs((codes >> 16 * (1 - place) & 0xff) - 26 - 200 * gelu(1.f).slope) < 0.64;
    return static_cast<int>(codes >> 16 * place & 0xff);
  };
  for (int i = -90000; i <= 90000; ++i) {
    const auto x = static_cast<float>(i * 1e-4);
    worst = std::max(worst, std::fabs(code(x, i & 1) - 26 - 200.0 * gelu(x).slope));
  }
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (int place = 0; place < 2; ++place) {
    good &= code(kInfinity, place) == 226 && code(-kInfinity, place) == 26;
    good &= code(NAN, place) == device::kCodeOfNan && code(70000.f, place) == 226;
  }
  if (worst < 0.64 && good) return;
  ++g_failures;
  std::printf("FAILED codes of gelu's slopes: off by %.2f of a step\n", worst);
}

// Every code, and slopes between codes.
void check_codes() {
  bool good = true;
  for (int q = 0; q < 256; ++q) {
    const auto code = static_cast<uint8_t>(q);
    const float slope = device::to_float(device::SlopeCode{code});
    if (q == device::kCodeOfNan) {
      good &= std::isnan(slope) && device::from_float<device::SlopeCode>(NAN).code == q;
    } else if (q <= 252) {
      good &= std::fabs(slope - (q - 26) / 200.0) < 1e-7;
      good &= device::from_float<device::SlopeCode>(slope).code == q;
    }
    for (int i = 0; i < 4; ++i) {
      // Among its neighbours: NaN or the largest code below it, anything above.
      for (const uint32_t others : {0u, 0xfcfcfcfcu, 0x1a7fe280u}) {
        const uint32_t word = (others & ~(0xffu << 8 * i)) | uint32_t{code} << 8 * i;
        const bool flagged = (device::nan_flags(word) & device::kNanFlags) != 0;
        good &= flagged == (q == device::kCodeOfNan);
        if (flagged) continue;
        const float fast = device::decode_slope(word, device::slope_selector(i));
        good &= std::fabs(fast - slope) < 1e-5;
      }
    }
  }
  good &=
      device::to_float(device::SlopeCode{26}) == 0 && device::to_float(device::SlopeCode{226}) == 1;
  for (int i = -13000; i <= 113000; ++i) {
    const float slope = static_cast<float>(i) * 1e-5f;
    const uint32_t pair = device::encode_slopes(slope, 1.f);
    const double exact = 26 + 200.0 * slope, code = pair & 0xff;
    good &= std::fabs(code - exact) < 0.6 && (pair >> 16 & 0xff) == 226;
  }
  if (good) return;
  ++g_failures;
  std::printf("FAILED codes of slopes\n");
}

}  // namespace
}  // namespace pixelfly

int main(int argc, char** argv) {
  using namespace pixelfly;
  int ran = 0;
  if (argc > 2 && std::string(argv[1]) == "fuzz") {
    const auto first = static_cast<uint64_t>(argc > 3 ? std::atoll(argv[3]) : 1);
    for (; ran < std::atoi(argv[2]); ++ran) {
      const Case c = random_case(first + static_cast<uint64_t>(ran));
      emulator::configure(first + static_cast<uint64_t>(ran), static_cast<Eagerness>(ran % 3));
      try {
        ran % 2 ? run<__half>(c) : run<__nv_bfloat16>(c);
      } catch (const std::exception& error) {
        ++g_failures;
        std::printf("FAILED %s: %s\n", c.name.c_str(), error.what());
      }
    }
    std::printf("kernels on the emulator: %d random calls, %d failures\n", ran, g_failures);
    return g_failures == 0 ? 0 : 1;
  }
  check_gelu();
  check_codes();
  check_gelu_codes();
  for (Case c : cases()) {
    const std::string name = c.name;
    for (size_t m = 0; m < 3; ++m) {
      for (const char* dtype : {"bf16", "fp16", "fp32"}) {
        const bool wide = dtype[2] == '3';
        // One dtype a mood is enough, fp32 has portable kernels only.
        if (wide ? std::string(c.path) != "sm80" || m != 0 : (m == 1) != (dtype[0] == 'f'))
          continue;
        c.name = name + " " + dtype + " " + kMoods[m].name;
        if (!wanted(c.name, argc, argv)) continue;
        emulator::configure(kMoods[m].seed, kMoods[m].eagerness);
        try {
          if (dtype[0] == 'b') {
            run<__nv_bfloat16>(c);
          } else if (wide) {
            run<float>(c);
          } else {
            run<__half>(c);
          }
          if (emulator::largest_cluster() != static_cast<unsigned>(c.cluster)) {
            throw std::runtime_error("clusters of " + std::to_string(emulator::largest_cluster()));
          }
        } catch (const std::exception& error) {
          ++g_failures;
          std::printf("FAILED %s: %s\n", c.name.c_str(), error.what());
        }
        ++ran;
      }
    }
  }
  std::printf("kernels on the emulator: %d runs, %d failures\n", ran, g_failures);
  return g_failures == 0 && ran > 0 ? 0 : 1;
}
