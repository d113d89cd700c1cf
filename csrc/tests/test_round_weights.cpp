// Runs round_weights through its launcher on the emulator (emulator/machine.h) and compares every
// output element, exactly. No GPU, no CUDA, no torch.
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "kernel_case.h"

namespace pixelfly {
namespace {

// One weight: values, and what is to become of them.
template <typename T>
struct Weight {
  int64_t rows, columns;
  int32_t tile;
  bool wide;
  int64_t offset;  // of the source from 16 bytes, in elements
  std::vector<float> floats;
  std::vector<T> narrow, target, want;

  Weight(int64_t r, int64_t c, int32_t t, bool w, int64_t o, std::mt19937& rng)
      : rows(r), columns(c), tile(t), wide(w), offset(o) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < offset + rows * columns; ++i) {
      floats.push_back(i % 41 == 5 ? NAN : i % 43 == 7 ? 3e38f : normal(rng));
      narrow.push_back(device::from_float<T>(floats.back()));
    }
    const int64_t b = tile > 0 ? tile : 1, across = (columns + b - 1) / b;
    want.assign(static_cast<size_t>((rows + b - 1) / b * across * b * b), T{});
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t at = ((i / b * across + j / b) * b + i % b) * b + j % b;
        want[static_cast<size_t>(at)] = narrow[static_cast<size_t>(offset + i * columns + j)];
      }
    }
    target = std::vector<T>(want.size() + 8);
    std::memset(static_cast<void*>(target.data()), 0xa5, target.size() * sizeof(T));
  }

  RoundedWeight parameters() {
    const void* source = wide ? static_cast<const void*>(floats.data() + offset)
                              : static_cast<const void*>(narrow.data() + offset);
    return {source, target.data(), wide, static_cast<int64_t>(want.size()), tile, rows, columns};
  }

  // Nothing is written past the end either.
  bool right() const {
    T poison;
    std::memset(static_cast<void*>(&poison), 0xa5, sizeof(T));
    for (size_t i = 0; i < target.size(); ++i) {
      const float got = device::to_float(target[i]);
      const float expected = device::to_float(i < want.size() ? want[i] : poison);
      if (got != expected && !(std::isnan(got) && std::isnan(expected))) return false;
    }
    return true;
  }
};

template <typename T>
void run(const char* name, DType dtype) {
  std::mt19937 rng(20211130);
  const DeviceInfo device{0, 90, 2, static_cast<int32_t>(emulator::kSharedLimit)};
  const struct {
    int64_t rows, columns;
    int32_t tile;
  } shapes[] = {{3, 64 * 64, 0}, {1, 1, 0},      {1, 13, 0},    {0, 8, 0},
                {20, 40, 64},    {196, 100, 64}, {70, 130, 16}, {64, 128, 64}};
  for (bool wide : {true, false}) {
    for (int64_t offset : {0, 1, 4}) {
      std::vector<Weight<T>> weights;
      RoundWeightsParams p{};
      p.dtype = dtype;
      for (const auto& s : shapes)
        weights.emplace_back(s.rows, s.columns, s.tile, wide, offset, rng);
      for (auto& w : weights) p.weights[p.count++] = w.parameters();
      check(launch_round_weights(p, device, nullptr));
      for (size_t i = 0; i < weights.size(); ++i) {
        if (weights[i].right()) continue;
        ++g_failures;
        std::printf("FAILED %s wide=%d offset=%d weight %d\n", name, wide, static_cast<int>(offset),
                    static_cast<int>(i));
      }
    }
  }
}

void check_refusals() {
  RoundWeightsParams p{};
  p.dtype = DType::kFloat32;
  p.count = 1;
  p.weights[0].size = 8;
  const DeviceInfo device{0, 90, 2, 0};
  expect_refusal(launch_round_weights(p, device, nullptr), "bfloat16 or float16");
  p.dtype = DType::kFloat16;
  p.weights[0].tile = 12;
  expect_refusal(launch_round_weights(p, device, nullptr), "multiples of 8");
}

}  // namespace
}  // namespace pixelfly

int main() {
  using namespace pixelfly;
  emulator::configure(1, emulator::Eagerness::kRandom);
  check_refusals();
  run<__nv_bfloat16>("bf16", DType::kBFloat16);
  run<__half>("fp16", DType::kFloat16);
  std::printf("round_weights on the emulator: %d failures\n", g_failures);
  return g_failures == 0 ? 0 : 1;
}
