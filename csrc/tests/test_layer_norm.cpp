// Runs the LayerNorm kernels through their launchers on the emulator (emulator/machine.h) and
// compares every output element with LayerNorm in double. No GPU, no CUDA, no torch.
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "kernel_case.h"

namespace pixelfly {
namespace {

int g_runs = 0;

template <typename T>
constexpr DType dtype_of() {
  return std::is_same_v<T, float>    ? DType::kFloat32
         : std::is_same_v<T, __half> ? DType::kFloat16
                                     : DType::kBFloat16;
}
template <typename T>
double tolerance() {
  return std::is_same_v<T, float> ? 3e-6 : std::is_same_v<T, __half> ? 6e-4 : 4.5e-3;
}

struct Shape {
  int tokens, features;
  bool every_type = false;
  int sms = 2;
  double offset = 0;  // of x, which a variance from sums of squares would not survive
};

// A stream in X, delta and its gradient in D, y and its gradient in Y, weights in W.
template <typename X, typename D, typename Y, typename W>
struct Run {
  Case c;
  Shape shape;
  DeviceInfo device;
  std::mt19937 rng{20211130};
  Tensor<W> weight, bias;
  Tensor<X> h;  // of the forward, for the backward
  std::vector<float> mean, rstd;

  Run(const std::string& name, const Shape& s) : shape(s) {
    c.name = name;
    device = {0, 90, s.sms, static_cast<int32_t>(emulator::kSharedLimit)};
    weight = Tensor<W>::random(1, s.features, 1, rng);
    bias = Tensor<W>::random(1, s.features, 1, rng);
    mean.assign(static_cast<size_t>(s.tokens) + 1, NAN);
    rstd = mean;
  }

  void forward(bool with_delta) {
    const int tokens = shape.tokens, features = shape.features;
    auto x = Tensor<X>::random(tokens, features, 1, rng);
    auto delta = Tensor<D>::random(tokens, features, 1, rng);
    for (int i = 0; i < tokens; ++i) {
      for (int j = 0; j < features; ++j) x.set(i, j, x.at(i, j) + shape.offset);
    }
    Tensor<Y> y(tokens, features);
    h = Tensor<X>(tokens, features);
    AddLayerNormParams p{};
    p.dtype = dtype_of<X>();
    p.delta_dtype = dtype_of<D>();
    p.y_dtype = dtype_of<Y>();
    p.weight_dtype = dtype_of<W>();
    p.tokens = tokens;
    p.features = features;
    p.eps = 1e-3f;
    p.x = x.pointer();
    if (with_delta) {
      p.delta = delta.pointer();
      p.h = h.pointer();
    } else {
      h = x;
    }
    p.weight = weight.pointer();
    p.bias = bias.pointer();
    p.y = y.pointer();
    p.mean = mean.data();
    p.rstd = rstd.data();
    check(launch_add_layer_norm(p, device, nullptr));

    Matrix want_h = zeros(tokens, features), want_y = want_h;
    for (int i = 0; i < tokens; ++i) {
      double sum = 0, squares = 0;
      for (int j = 0; j < features; ++j) {
        want_h[i][j] = x.at(i, j) + (with_delta ? delta.at(i, j) : 0);
        sum += h.at(i, j);
      }
      for (int j = 0; j < features; ++j) squares += std::pow(h.at(i, j) - sum / features, 2);
      const double scale = 1 / std::sqrt(squares / features + 1e-3);
      for (int j = 0; j < features; ++j) {
        want_y[i][j] = (h.at(i, j) - sum / features) * scale * weight.at(0, j) + bias.at(0, j);
      }
      const double slack = 1 + std::fabs(shape.offset);
      expect("mean", mean[i], sum / features, 1e-6 * slack);
      expect("rstd", rstd[i], scale, 2e-6 * scale * slack);
    }
    compare(c, "h", h, want_h, tolerance<X>());
    compare(c, "y", y, want_y, tolerance<Y>() + 1e-7 * std::fabs(shape.offset));
  }

  void backward(bool with_dh, bool with_ddelta, bool with_weights) {
    const int tokens = shape.tokens, features = shape.features;
    auto dy = Tensor<Y>::random(tokens, features, 1, rng);
    auto dh = Tensor<X>::random(tokens, features, 1, rng);
    Tensor<X> dx(tokens, features);
    Tensor<D> ddelta(tokens, features);
    Tensor<W> dweight(1, features), dbias(1, features);
    AddLayerNormGradParams p{};
    p.dtype = dtype_of<X>();
    p.delta_dtype = dtype_of<D>();
    p.y_dtype = dtype_of<Y>();
    p.weight_dtype = dtype_of<W>();
    p.tokens = tokens;
    p.features = features;
    p.dy = dy.pointer();
    p.dh = with_dh ? dh.pointer() : nullptr;
    p.h = h.pointer();
    p.weight = weight.pointer();
    p.mean = mean.data();
    p.rstd = rstd.data();
    p.dx = dx.pointer();
    p.ddelta = with_ddelta ? ddelta.pointer() : nullptr;
    if (with_weights) {
      p.dweight = dweight.pointer();
      p.dbias = dbias.pointer();
    }
    std::vector<float> workspace(add_layer_norm_grad_workspace(p, device) / sizeof(float) + 4, NAN);
    p.workspace = workspace.data();
    check(launch_add_layer_norm_grad(p, device, nullptr));

    Matrix want = zeros(tokens, features), want_weight = zeros(1, features),
           want_bias = want_weight;
    for (int i = 0; i < tokens; ++i) {
      auto z = [&](int j) { return (h.at(i, j) - mean[i]) * rstd[i]; };
      double g = 0, gz = 0;
      for (int j = 0; j < features; ++j) {
        g += dy.at(i, j) * weight.at(0, j) / features;
        gz += dy.at(i, j) * weight.at(0, j) * z(j) / features;
        want_weight[0][j] += dy.at(i, j) * z(j);
        want_bias[0][j] += dy.at(i, j);
      }
      for (int j = 0; j < features; ++j) {
        want[i][j] = rstd[i] * (dy.at(i, j) * weight.at(0, j) - g - z(j) * gz);
        if (with_dh) want[i][j] += dh.at(i, j);
      }
    }
    const double slack = 1e-7 * std::fabs(shape.offset);
    compare(c, "dx", dx, want, tolerance<X>() + slack);
    if (with_ddelta) compare(c, "ddelta", ddelta, want, tolerance<D>() + slack);
    if (with_weights) {
      compare(c, "dweight", dweight, want_weight, tolerance<W>() + slack);
      compare(c, "dbias", dbias, want_bias, tolerance<W>());
    }
  }

  void expect(const char* what, double got, double want, double allowed) {
    if (std::fabs(got - want) <= allowed) return;
    ++g_failures;
    std::printf("FAILED %s: %s is %.9g, not %.9g\n", c.name.c_str(), what, got, want);
  }
};

template <typename X, typename D, typename Y, typename W>
void run(const char* types, const Shape& shape) {
  for (const bool all : {true, false}) {
    const std::string name = std::string(types) + " T=" + std::to_string(shape.tokens) +
                             " C=" + std::to_string(shape.features) + (all ? "" : " alone");
    try {
      Run<X, D, Y, W> r(name, shape);
      r.forward(all);
      r.backward(all, all && !std::is_same_v<X, D>, true);
      if (!all) r.backward(true, false, false);
    } catch (const std::exception& error) {
      ++g_failures;
      std::printf("FAILED %s: %s\n", name.c_str(), error.what());
    }
    ++g_runs;
  }
}

void run_types(const Shape& shape) {
  using B = __nv_bfloat16;
  using H = __half;
  run<float, B, B, float>("fp32, bf16 branches", shape);
  run<B, B, B, float>("bf16, fp32 weights", shape);
  if (!shape.every_type) return;
  run<float, float, float, float>("fp32", shape);
  run<float, H, H, float>("fp32, fp16 branches", shape);
  run<float, B, float, float>("fp32, bf16 delta", shape);
  run<float, float, H, float>("fp32, fp16 y", shape);
  run<B, B, B, B>("bf16", shape);
  run<H, H, H, H>("fp16", shape);
  run<H, H, H, float>("fp16, fp32 weights", shape);
}

void check_refusals() {
  AddLayerNormParams p{};
  p.dtype = p.delta_dtype = p.y_dtype = p.weight_dtype = DType::kFloat32;
  auto refuses = [&](int features, DType delta, DType y, const char* word) {
    p.features = features;
    p.delta_dtype = delta;
    p.y_dtype = y;
    expect_refusal(launch_add_layer_norm(p, {}, nullptr), word);
  };
  refuses(12, DType::kFloat32, DType::kFloat32, "multiple of 8");
  refuses(16392, DType::kFloat32, DType::kFloat32, "16384, got 16392");
  refuses(64, DType::kBFloat16, DType::kFloat16, "one 16-bit dtype");
}

}  // namespace
}  // namespace pixelfly

int main() {
  using namespace pixelfly;
  emulator::configure(1, emulator::Eagerness::kRandom);
  check_refusals();
  const Shape shapes[] = {{0, 64},    {1, 8},           {37, 8, true},
                          {70, 256},  {29, 768, true},  {53, 768, false, 1, 500},
                          {13, 1000}, {31, 1024, true}, {11, 2048},
                          {11, 3000}, {7, 4096, true},  {7, 4096, false, 1, 500},
                          {5, 6000},  {3, 16384}};
  for (const Shape& shape : shapes) run_types(shape);
  std::printf("LayerNorm on the emulator: %d runs, %d failures\n", g_runs, g_failures);
  return g_failures == 0 ? 0 : 1;
}
