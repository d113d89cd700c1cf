// Runs product_sm90 where tokens are columns, on the emulator: an MLP's first layer with its
// slopes, its second layer, and that one's input gradient times the slopes; each output element is
// compared with a plain sum in double. No GPU, no CUDA, no torch.
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "device/epilogue_math.cuh"
#include "kernel_cases.h"
#include "launch/product_sm90.h"

namespace pixelfly {
namespace {

struct Shape {
  const char* name;
  int samples, features, hidden, columns;
  Activation activation;
  int block = 64, sms = 3;
  Keep keep = everything;
};

// [samples][features][columns] as a matrix of samples * features rows.
template <typename T>
using Columns = Tensor<T>;

template <typename T>
struct Layer {
  int n, k;  // the weight's true sizes; the layout's are multiples of the block size
  LayoutView layout;
  std::vector<int32_t> plan;
  PlanHeader header;
  Tensor<T> blocks, bias;
  Matrix weight;

  Layer(int n_, int k_, const Shape& s, std::mt19937& rng) : n(n_), k(k_) {
    const int b = s.block, rows = (n + b - 1) / b, cols = (k + b - 1) / b;
    layout = {rows * b, cols * b, b, 0, {}, {}};
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < cols; ++j) {
        if (!(rows <= cols ? s.keep(i, j) : s.keep(j, i))) continue;
        layout.row_idx.push_back(i);
        layout.col_idx.push_back(j);
      }
    }
    plan = build_plan(layout);
    std::memcpy(&header, plan.data(), sizeof(header));
    blocks = Tensor<T>::random(int64_t{layout.nnz()} * b, b, 0.1, rng);
    bias = Tensor<T>::random(1, n, 1, rng);
    weight = zeros(n, k);
    for (int32_t q = 0; q < layout.nnz(); ++q) {
      for (int i = 0; i < b; ++i) {
        for (int j = 0; j < b; ++j) {
          const int row = layout.row_idx[q] * b + i, col = layout.col_idx[q] * b + j;
          if (row < n && col < k) {
            weight[row][col] = blocks.at(int64_t{q} * b + i, j);
          } else {
            blocks.set(int64_t{q} * b + i, j, 0);
          }
        }
      }
    }
  }
};

template <typename T>
struct Run {
  const Shape& s;
  Case c;
  DeviceInfo device;
  using Slope = device::SlopeOf<T>;
  double tolerance = std::is_same_v<T, __half> ? 2e-3 : 1.5e-2;

  ProductParams params(Layer<T>& layer, bool transposed, Tensor<T>& x, Tensor<T>& y) const {
    ProductParams p{};
    p.dtype = std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16;
    p.transposed = transposed;
    p.tokens = int64_t{s.samples} * s.columns;
    p.columns = s.columns;
    p.in_features = transposed ? layer.n : layer.k;
    p.out_features = transposed ? layer.k : layer.n;
    p.x = x.pointer();
    p.blocks = layer.blocks.pointer();
    p.y = y.pointer();
    p.header = &layer.header;
    p.plan = layer.plan.data();
    return p;
  }
  void launch(const ProductParams& p) const {
    if (!product_sm90_supports(p, device)) throw std::runtime_error("not supported");
    check(launch_product_sm90(p, device, nullptr));
  }

  // weight · x (or its transpose · x), as [samples * out][columns].
  Matrix multiply(const Layer<T>& layer, bool transposed, const Tensor<T>& x) const {
    const int in = transposed ? layer.n : layer.k, out = transposed ? layer.k : layer.n;
    Matrix y = zeros(int64_t{s.samples} * out, s.columns);
    for (int b = 0; b < s.samples; ++b) {
      for (int i = 0; i < out; ++i) {
        for (int l = 0; l < in; ++l) {
          const double w = transposed ? layer.weight[l][i] : layer.weight[i][l];
          if (w == 0) continue;
          for (int j = 0; j < s.columns; ++j) y[b * out + i][j] += w * x.at(b * in + l, j);
        }
      }
    }
    return y;
  }

  void run() {
    std::mt19937 rng{20211130};
    Layer<T> first(s.hidden, s.features, s, rng), second(s.features, s.hidden, s, rng);
    const int64_t outer = int64_t{s.samples} * s.features, inner = int64_t{s.samples} * s.hidden;
    auto x = Columns<T>::random(outer, s.columns, 1, rng);
    auto dy = Columns<T>::random(outer, s.columns, 1, rng);
    Columns<T> hidden(inner, s.columns), y(outer, s.columns), dz(inner, s.columns),
        dx(outer, s.columns);
    Columns<Slope> slopes(inner, s.columns);

    ProductParams p = params(first, false, x, hidden);
    p.bias = first.bias.pointer();
    p.activation = s.activation;
    p.slope_out = s.activation == Activation::kNone ? nullptr : slopes.pointer();
    launch(p);
    Matrix want = multiply(first, false, x), slope = zeros(inner, s.columns);
    for (int64_t r = 0; r < inner; ++r) {
      for (int j = 0; j < s.columns; ++j) {
        device::dispatch_activation(s.activation, [&](auto tag) {
          const double z = want[r][j] + first.bias.at(0, r % s.hidden);
          const auto out =
              device::activate_with_slope<decltype(tag)::value, true>(static_cast<float>(z));
          want[r][j] = out.value;
          slope[r][j] = out.slope;
        });
      }
    }
    compare(c, "hidden", hidden, want, tolerance);

    p = params(second, false, hidden, y);
    launch(p);
    compare(c, "y", y, multiply(second, false, hidden), tolerance);

    p = params(second, true, dy, dz);
    p.slope = p.slope_out = nullptr;
    if (s.activation != Activation::kNone) p.slope = slopes.pointer();
    launch(p);
    want = multiply(second, true, dy);
    for (int64_t r = 0; r < inner; ++r) {
      for (int j = 0; j < s.columns; ++j) want[r][j] *= slope[r][j];
    }
    compare(c, "dz", dz, want, tolerance);

    p = params(first, true, dz, dx);
    launch(p);
    compare(c, "dx", dx, multiply(first, true, dz), tolerance);
  }
};

}  // namespace
}  // namespace pixelfly

int main() {
  using namespace pixelfly;
  const Shape shapes[] = {
      {"mixer", 2, 196, 384, 144, Activation::kGelu},
      {"one column tile", 3, 64, 128, 64, Activation::kSilu},
      {"16 columns", 5, 20, 40, 16, Activation::kRelu, 64, 1},
      {"sparse", 2, 200, 260, 272, Activation::kGeluTanh, 64, 2, checkered},
      {"rows alone", 1, 2304, 256, 144, Activation::kGelu, 64, 3, bands},
      {"rows alone, no activation", 1, 2304, 240, 64, Activation::kNone, 64, 1, bands},
      {"b128", 1, 130, 140, 128, Activation::kGelu, 128},
      {"no activation", 2, 70, 90, 160, Activation::kNone},
  };
  return run_each<Run>("columns", shapes);
}
