// Runs softmax_minus_target through its launcher on the emulator (emulator/machine.h) and compares
// every output element with softmax in double. No GPU, no CUDA, no torch.
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "kernel_case.h"

namespace pixelfly {
namespace {

int g_runs = 0;
constexpr int64_t kIgnore = -100;

struct Shape {
  int columns, classes;
  int shared = static_cast<int>(emulator::kSharedLimit);
};

void fail(const Case& c, const char* what, int row, double got, double want) {
  ++g_failures;
  std::printf("FAILED %s: %s of row %d is %.9g, not %.9g\n", c.name.c_str(), what, row, got, want);
}

template <typename T>
void run(const Shape& shape, DType dtype, bool write) {
  const double bound = dtype == DType::kFloat16 ? 6e-4 : 4.5e-3;
  Case c;
  c.name = "columns=" + std::to_string(shape.columns) +
           " classes=" + std::to_string(shape.classes) + " shared=" + std::to_string(shape.shared);
  std::mt19937 rng{20261128};
  // Rows: three plain ones (the last class, the first), ignored, no class, NaN, -inf in front.
  std::vector<int64_t> target = {shape.classes / 2, shape.classes - 1, 0, kIgnore, shape.classes, 0,
                                 shape.classes - 1};
  const int tokens = static_cast<int>(target.size());
  auto logits = Tensor<T>::random(tokens, shape.columns, 3, rng);
  logits.set(5, shape.classes / 3, NAN);
  for (int j = 0; j < shape.classes - 1; ++j) logits.set(6, j, -INFINITY);
  for (int i = 0; i < tokens; ++i) {  // padding may hold anything
    for (int j = shape.classes; j < shape.columns; ++j) logits.set(i, j, NAN);
  }
  Matrix want = zeros(tokens, shape.columns);
  std::vector<double> want_loss(target.size());
  for (int i = 0; i < tokens; ++i) {
    double top = -INFINITY, sum = 0;
    for (int j = 0; j < shape.classes; ++j) top = std::fmax(top, logits.at(i, j));
    for (int j = 0; j < shape.classes; ++j) sum += std::exp(logits.at(i, j) - top);
    const auto at = static_cast<size_t>(i);
    const bool bad = target[at] == shape.classes;
    for (int j = 0; j < shape.classes; ++j) {
      const double p = std::exp(logits.at(i, j) - top) / sum - (target[at] == j);
      want[at][static_cast<size_t>(j)] = target[at] == kIgnore ? 0 : bad ? NAN : p;
    }
    want_loss[at] = target[at] == kIgnore ? 0
                    : bad ? NAN
                          : top + std::log(sum) - logits.at(i, static_cast<int>(target[at]));
  }
  const Tensor<T> before = logits;
  std::vector<float> loss(target.size(), NAN);
  SoftmaxMinusTargetParams p{};
  p.dtype = dtype;
  p.tokens = tokens;
  p.columns = shape.columns;
  p.classes = shape.classes;
  p.ignore_index = kIgnore;
  p.write = write;
  p.logits = logits.pointer();
  p.stride = logits.stride;
  p.target = target.data();
  p.loss = loss.data();
  check(launch_softmax_minus_target(p, {0, 90, 2, shape.shared}, nullptr));
  for (int i = 0; i < tokens; ++i) {
    const double got = loss[static_cast<size_t>(i)], expected = want_loss[static_cast<size_t>(i)];
    const bool same = std::isnan(expected) ? std::isnan(got) : std::fabs(got - expected) <= 2e-5;
    if (!same) fail(c, "loss", i, got, expected);
  }
  if (write) {
    compare(c, "gradient", logits, want, bound);
  } else if (std::memcmp(before.data.data(), logits.data.data(), logits.data.size() * 2) != 0) {
    fail(c, "logits", 0, 0, 0);
  }
  ++g_runs;
}

void check_refusals() {
  auto refuses = [](int columns, int classes, DType dtype, const char* word) {
    SoftmaxMinusTargetParams p{};
    p.dtype = dtype;
    p.columns = columns;
    p.classes = classes;
    p.stride = columns;
    p.tokens = 1;
    expect_refusal(launch_softmax_minus_target(p, {}, nullptr), word);
  };
  refuses(12, 12, DType::kBFloat16, "multiples of 8");
  refuses(16, 17, DType::kBFloat16, "between 1 and");
  refuses(16, 16, DType::kFloat32, "bfloat16 or float16");
}

}  // namespace
}  // namespace pixelfly

int main() {
  using namespace pixelfly;
  emulator::configure(1, emulator::Eagerness::kRandom);
  check_refusals();
  for (const Shape& shape : {Shape{8, 3}, Shape{64, 64}, Shape{128, 72}, Shape{10048, 10001},
                             Shape{10048, 10001, 8192}}) {
    for (const bool write : {true, false}) {
      run<__nv_bfloat16>(shape, DType::kBFloat16, write);
      run<__half>(shape, DType::kFloat16, write);
    }
  }
  std::printf("softmax on the emulator: %d runs, %d failures\n", g_runs, g_failures);
  return g_failures == 0 ? 0 : 1;
}
