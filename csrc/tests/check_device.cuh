// What the check programs share: layouts of the kinds that matter, filled tensors, timing.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "pixelfly/launch.h"
#include "planner/plan.h"
#include "tests/naive_product.cuh"

#define CHECK_CUDA(call)                                                                \
  do {                                                                                  \
    const cudaError_t e_ = (call);                                                      \
    if (e_ != cudaSuccess) {                                                            \
      std::printf("%s:%d %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(e_)); \
      std::exit(1);                                                                     \
    }                                                                                   \
  } while (0)

namespace pixelfly {

// kQuarter: strides 1, 2, 4 on a grid of 16, stretched: a quarter of the matrix. kMlp: what an MLP
// gets of sparsify_ at 25 % with 64 global rows and columns: fewer strides, stretched.
enum class Kind { kButterfly, kRandom, kGlobal, kFull, kEmpty, kQuarter, kMlp };

inline LayoutView make_layout(int K, int N, int block_size, int rank, Kind kind) {
  LayoutView l{N, K, block_size, rank, {}, {}};
  const int64_t rows = l.num_rows(), cols = l.num_cols(), cells = std::min(rows, cols);
  std::mt19937 random(7);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      const auto e =
          static_cast<uint64_t>(i * cells / rows) ^ static_cast<uint64_t>(j * cells / cols);
      const bool butterfly = (e & (e - 1)) == 0;
      bool keep = butterfly;
      if (kind == Kind::kRandom) keep = random() % 100 < 30 && i % 3 != 1 && j % 4 != 2;
      if (kind == Kind::kGlobal) keep = butterfly || i == 0 || j == 0;
      if (kind == Kind::kFull) keep = true;
      if (kind == Kind::kQuarter) {
        const int64_t d = (i * 16 / rows) ^ (j * 16 / cols);
        keep = d == 0 || d == 1 || d == 2 || d == 4;
      }
      if (kind == Kind::kMlp) {
        const int64_t grid = std::min<int64_t>(cells, 16);
        const int64_t d = (i * grid / rows) ^ (j * grid / cols);
        keep = i == 0 || j == 0 || d == 0 || (cells >= 16 && d == 1) ||
               (cells > 16 && (d == 2 || d == 4));
      }
      if (kind == Kind::kEmpty) keep = false;
      if (!keep) continue;
      l.row_idx.push_back(static_cast<int32_t>(i));
      l.col_idx.push_back(static_cast<int32_t>(j));
    }
  }
  return l;
}

template <typename T>
struct Arena {
  std::vector<void*> all;
  T* data(size_t n, uint32_t seed, float scale = 1.f) {  // seed 0: poisoned with NaN
    T* p;
    CHECK_CUDA(cudaMalloc(&p, n * sizeof(T) + 256));
    all.push_back(p);
    if (seed) {
      fill<T><<<2048, 256>>>(p, n, seed, scale);
    } else {
      CHECK_CUDA(cudaMemset(p, 0xff, n * sizeof(T)));
    }
    CHECK_CUDA(cudaGetLastError());
    return p;
  }
  template <typename Slope>
  Slope* slopes(size_t n, uint32_t seed) {
    auto* p = reinterpret_cast<Slope*>(data((n * sizeof(Slope) + sizeof(T) - 1) / sizeof(T), 0));
    if (seed) fill_slopes<<<2048, 256>>>(p, n, seed);
    CHECK_CUDA(cudaGetLastError());
    return p;
  }
  ~Arena() {
    for (void* p : all) cudaFree(p);
  }
};

// A layout's plan, on the host and on the device, and what launches need to know of the device.
struct DevicePlan {
  explicit DevicePlan(const LayoutView& layout) : host(build_plan(layout)) {
    std::memcpy(&header, host.data(), sizeof header);
    CHECK_CUDA(cudaMalloc(&data, host.size() * 4));
    CHECK_CUDA(cudaMemcpy(data, host.data(), host.size() * 4, cudaMemcpyHostToDevice));
    cudaDeviceProp prop;
    CHECK_CUDA(cudaGetDeviceProperties(&prop, 0));
    device = {0, prop.major * 10 + prop.minor, prop.multiProcessorCount,
              static_cast<int32_t>(prop.sharedMemPerBlockOptin)};
  }
  DevicePlan(const DevicePlan&) = delete;
  ~DevicePlan() { cudaFree(data); }

  std::vector<int32_t> host;
  PlanHeader header;
  int32_t* data = nullptr;
  DeviceInfo device;
};

// Sets of tensors to rotate over so that none is found in L2.
inline int rotating_sets(bool timing, int64_t tokens, int64_t features) {
  return timing ? std::clamp(static_cast<int>(300e6 / (2.0 * tokens * features)), 2, 6) : 1;
}

// Median ms per launch of a graph of `launches`, after 0.3 s of load.
inline float time_graph(const std::function<void(int, cudaStream_t)>& launch, int launches) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  cudaEvent_t begin, end;
  CHECK_CUDA(cudaStreamCreate(&stream));
  CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < launches; ++i) launch(i, stream);
  CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
  CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  CHECK_CUDA(cudaEventCreate(&begin));
  CHECK_CUDA(cudaEventCreate(&end));
  auto run = [&](int times) {
    float ms;
    CHECK_CUDA(cudaEventRecord(begin, stream));
    for (int i = 0; i < times; ++i) CHECK_CUDA(cudaGraphLaunch(exec, stream));
    CHECK_CUDA(cudaEventRecord(end, stream));
    CHECK_CUDA(cudaEventSynchronize(end));
    CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
    return ms;
  };
  for (float total = 0; total < 300;) total += run(20);
  std::vector<float> samples;
  for (int i = 0; i < 21; ++i) samples.push_back(run(1) / launches);
  std::sort(samples.begin(), samples.end());
  CHECK_CUDA(cudaGraphExecDestroy(exec));
  CHECK_CUDA(cudaGraphDestroy(graph));
  CHECK_CUDA(cudaStreamDestroy(stream));
  return samples[samples.size() / 2];
}

}  // namespace pixelfly
