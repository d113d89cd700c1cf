// How long short attention's kernels take, one launch after the other.
//
//   nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a --expt-relaxed-constexpr -Icsrc
//        -Icsrc/include csrc/tests/measure_short_attention.cu csrc/launch/short_attention_sm90.cu
//        csrc/launch/tensor_map.cpp csrc/launch/device_info.cpp -o measure_short_attention
#include <cuda_bf16.h>

#include <functional>

#include "tests/check_device.cuh"

using namespace pixelfly;

constexpr int kWarmup = 1000, kLaunches = 200;

float milliseconds(const std::function<Status()>& launch) {
  cudaEvent_t begin, end;
  CHECK_CUDA(cudaEventCreate(&begin));
  CHECK_CUDA(cudaEventCreate(&end));
  for (int i = 0; i < kWarmup + kLaunches; ++i) {
    if (i == kWarmup) CHECK_CUDA(cudaEventRecord(begin));
    const Status status = launch();
    if (!status.ok()) {
      std::printf("%s\n", status.message.c_str());
      std::exit(1);
    }
  }
  CHECK_CUDA(cudaEventRecord(end));
  CHECK_CUDA(cudaEventSynchronize(end));
  float total;
  CHECK_CUDA(cudaEventElapsedTime(&total, begin, end));
  return total / kLaunches;
}

int main() {
  const struct {
    int samples, tokens, heads;
  } shapes[] = {{128, 197, 12}, {128, 208, 12}, {256, 50, 12}, {128, 128, 12}, {64, 197, 16}};
  DeviceInfo device;
  if (!device_info(0, &device).ok()) return 1;
  for (const auto& s : shapes) {
    const size_t rows = size_t(s.samples) * s.tokens * s.heads, elements = rows * 64;
    Arena<__nv_bfloat16> arena;
    __nv_bfloat16 *qkv = arena.data(3 * elements, 1), *dy = arena.data(elements, 2);
    __nv_bfloat16 *y = arena.data(elements, 0), *dqkv = arena.data(3 * elements, 0);
    float* log_sum;
    CHECK_CUDA(cudaMalloc(&log_sum, rows * sizeof(float)));
    const ShortAttentionParams p{DType::kBFloat16, s.samples, s.tokens, s.heads, .125f, qkv, y,
                                 log_sum};
    const ShortAttentionGradParams g{DType::kBFloat16, s.samples, s.tokens, s.heads, .125f, qkv, y,
                                     log_sum,          dy,        dqkv};
    const float forward = milliseconds([&] { return launch_short_attention(p, device, nullptr); });
    const float backward =
        milliseconds([&] { return launch_short_attention_grad(g, device, nullptr); });
    std::printf("%d x %d x %d: forward %.4f ms, backward %.4f ms\n", s.samples, s.tokens, s.heads,
                forward, backward);
    CHECK_CUDA(cudaFree(log_sum));
  }
  return 0;
}
