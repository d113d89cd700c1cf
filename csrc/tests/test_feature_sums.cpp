// Runs feature_sums through its launcher on the emulator (emulator/machine.h) and compares every
// sum with one in double. No GPU, no CUDA, no torch.
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "kernel_case.h"

namespace pixelfly {
namespace {

template <typename T>
void run(const char* name, DType dtype) {
  const struct {
    int samples, features, columns;
  } shapes[] = {{3, 20, 16}, {19, 5, 776}, {8, 1, 256}, {0, 6, 8}};
  std::mt19937 rng(20211130);
  std::vector<Tensor<T>> tensors;
  std::vector<std::vector<float>> sums;
  FeatureSumsParams p{};
  p.dtype = dtype;
  for (const auto& s : shapes) {
    tensors.push_back(Tensor<T>::random(s.samples * s.features, s.columns, 1, rng));
    sums.emplace_back(s.features, NAN);
  }
  for (const auto& s : shapes) {
    const int i = p.count++;
    p.sums[i] = {tensors[i].pointer(), sums[i].data(), s.samples, s.columns, s.features};
  }
  check(launch_feature_sums(p, {}, nullptr));
  for (int i = 0; i < p.count; ++i) {
    const auto& s = shapes[i];
    for (int f = 0; f < s.features; ++f) {
      double want = 0;
      for (int sample = 0; sample < s.samples; ++sample) {
        for (int c = 0; c < s.columns; ++c) want += tensors[i].at(sample * s.features + f, c);
      }
      if (std::fabs(sums[i][f] - want) <= 1e-3) continue;
      ++g_failures;
      std::printf("FAILED %s tensor %d: sum %d is %g, not %g\n", name, i, f, sums[i][f], want);
    }
  }
}

void check_refusals() {
  FeatureSumsParams p{};
  p.count = 1;
  p.sums[0].columns = 12;
  expect_refusal(launch_feature_sums(p, {}, nullptr), "multiple of 8");
  p.count = kMaxFeatureSums + 1;
  expect_refusal(launch_feature_sums(p, {}, nullptr), "too many tensors");
}

}  // namespace
}  // namespace pixelfly

int main() {
  using namespace pixelfly;
  emulator::configure(1, emulator::Eagerness::kRandom);
  check_refusals();
  run<float>("fp32", DType::kFloat32);
  run<__nv_bfloat16>("bf16", DType::kBFloat16);
  run<__half>("fp16", DType::kFloat16);
  std::printf("feature_sums on the emulator: %d failures\n", g_failures);
  return g_failures == 0 ? 0 : 1;
}
