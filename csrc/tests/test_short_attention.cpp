// Runs short_attention_sm90 and its gradient through their launchers on the emulator
// (emulator/machine.h) and compares every output element with attention in double. No GPU, no CUDA,
// no torch.
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "kernel_case.h"

namespace pixelfly {
namespace {

constexpr int kD = kShortAttentionFeatures;

struct Shape {
  const char* name;
  int samples, tokens, heads;
  float scale = 0.125f;
  double spread = 1;  // of q and k
  int sms = 2;
  bool nan = false;   // in the last sample's v and dy
  bool huge = false;  // equal rows, negative scores, Σ dy ⊙ y beyond fp16's range
};

template <typename T>
struct Run {
  const Shape& s;
  Case c;
  DeviceInfo device;
  Tensor<T> qkv{}, dy{}, y{}, dqkv{};
  std::vector<float> log_sum{};
  Matrix want_y{}, want_dqkv{};
  std::vector<double> want_log_sum{};

  Matrix matrix(const Tensor<T>& t, int sample, int column) const {
    Matrix m = zeros(s.tokens, kD);
    for (int i = 0; i < s.tokens; ++i) {
      for (int j = 0; j < kD; ++j) m[i][j] = t.at(sample * s.tokens + i, column * kD + j);
    }
    return m;
  }

  // Fills in what one head's outputs should be.
  void expect(int sample, int head) {
    const Matrix q = matrix(qkv, sample, head), k = matrix(qkv, sample, s.heads + head);
    const Matrix v = matrix(qkv, sample, 2 * s.heads + head), up = matrix(dy, sample, head);
    for (int i = 0; i < s.tokens; ++i) {
      std::vector<double> p(s.tokens), dp(s.tokens);
      double top = -INFINITY, sum = 0, d = 0;
      for (int j = 0; j < s.tokens; ++j) {
        for (int f = 0; f < kD; ++f) p[j] += s.scale * q[i][f] * k[j][f];
        top = std::fmax(top, p[j]);
      }
      for (double& score : p) sum += score = std::exp(score - top);
      const int64_t row = int64_t{sample} * s.tokens + i;
      want_log_sum[(int64_t{sample} * s.heads + head) * s.tokens + i] = top + std::log(sum);
      for (int j = 0; j < s.tokens; ++j) {
        p[j] /= sum;
        for (int f = 0; f < kD; ++f) {
          want_y[row][head * kD + f] += p[j] * v[j][f];
          dp[j] += up[i][f] * v[j][f];
        }
        d += p[j] * dp[j];
      }
      for (int j = 0; j < s.tokens; ++j) {
        const double ds = p[j] * (dp[j] - d) * s.scale;
        auto& of_key = want_dqkv[int64_t{sample} * s.tokens + j];
        for (int f = 0; f < kD; ++f) {
          want_dqkv[row][head * kD + f] += ds * k[j][f];
          of_key[(s.heads + head) * kD + f] += ds * q[i][f];
          of_key[(2 * s.heads + head) * kD + f] += p[j] * up[i][f];
        }
      }
    }
  }

  void run() {
    const int64_t rows = int64_t{s.samples} * s.tokens, width = int64_t{s.heads} * kD;
    std::mt19937 rng{20211130};
    qkv = Tensor<T>::random(rows, 3 * width, s.spread, rng);
    dy = Tensor<T>::random(rows, width, 1, rng);
    if (s.huge) {
      const double of_matrix[] = {1, -1.35, 10};
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < 3 * width; ++j) qkv.set(i, j, of_matrix[j / width]);
        for (int64_t j = 0; j < width; ++j) dy.set(i, j, 200);
      }
    }
    if (s.nan) {
      qkv.set(rows - 1, 2 * width, NAN);
      dy.set(rows - s.tokens, 0, NAN);
    }
    y = Tensor<T>(rows, width);
    dqkv = Tensor<T>(rows, 3 * width);
    log_sum.assign(static_cast<size_t>(rows * s.heads), NAN);
    want_y = zeros(rows, width);
    want_dqkv = zeros(rows, 3 * width);
    want_log_sum.resize(log_sum.size());
    for (int sample = 0; sample < s.samples; ++sample) {
      for (int head = 0; head < s.heads; ++head) expect(sample, head);
    }
    const DType dtype = std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16;
    check(launch_short_attention(
        {dtype, s.samples, s.tokens, s.heads, s.scale, qkv.pointer(), y.pointer(), log_sum.data()},
        device, nullptr));
    const double bound = dtype == DType::kFloat16 ? 2e-3 : 1.5e-2;
    compare(c, "y", y, want_y, bound);
    for (size_t i = 0; i < log_sum.size(); ++i) {
      if (!(std::fabs(log_sum[i] - want_log_sum[i]) <= 1e-4 * (1 + std::fabs(want_log_sum[i])))) {
        ++g_failures;
        std::printf("FAILED %s: log sum %zu is %g, not %g\n", c.name.c_str(), i, log_sum[i],
                    want_log_sum[i]);
        break;
      }
    }
    check(launch_short_attention_grad({dtype, s.samples, s.tokens, s.heads, s.scale, qkv.pointer(),
                                       y.pointer(), log_sum.data(), dy.pointer(), dqkv.pointer()},
                                      device, nullptr));
    compare(c, "dqkv", dqkv, want_dqkv, bound);
  }
};

void check_refusals(const DeviceInfo& device) {
  auto refuses = [&](DType dtype, int tokens, float scale, int arch, const char* word) {
    ShortAttentionParams p{};
    p.dtype = dtype;
    p.samples = p.heads = 1;
    p.tokens = tokens;
    p.scale = scale;
    DeviceInfo other = device;
    other.arch = arch;
    expect_refusal(launch_short_attention(p, other, nullptr), word);
  };
  refuses(DType::kBFloat16, 209, 1, 90, "at most 208 tokens");
  refuses(DType::kFloat32, 10, 1, 90, "bfloat16 or float16");
  refuses(DType::kFloat16, 10, 1, 80, "Hopper");
  refuses(DType::kFloat16, 10, 0, 90, "positive");
}

}  // namespace
}  // namespace pixelfly

int main() {
  using namespace pixelfly;
  const Shape shapes[] = {
      {"a ViT's", 1, 197, 3},
      {"as long as it goes", 1, 208, 1, 0.125f, 1, 1},
      {"one token", 3, 1, 2},
      {"a tile", 2, 16, 1},
      {"a tile and a token", 2, 17, 2},
      {"four tiles, many heads", 5, 64, 3, 0.2f, 1, 1},
      {"seven tiles", 1, 100, 2},
      {"large scores", 2, 50, 1, 0.125f, 12},
      {"NaN in the last sample", 3, 20, 2, 0.125f, 1, 2, true},
      {"dS beyond the tokens", 1, 17, 1, 0.125f, 1, 1, false, true},
  };
  check_refusals({0, 90, 2, static_cast<int32_t>(emulator::kSharedLimit)});
  return run_each<Run>("short attention", shapes);
}
