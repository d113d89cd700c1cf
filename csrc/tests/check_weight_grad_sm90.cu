// Checks weight_grad_sm90 element by element against naive kernels, and times it. No torch needed.
//
//   nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -Icsrc -Icsrc/include
//        csrc/tests/check_weight_grad_sm90.cu csrc/launch/weight_grad_sm90.cu
//        csrc/launch/tensor_map.cpp csrc/planner/*.cpp -o check_weight_grad_sm90
//   ./check_weight_grad_sm90 check | time [case substring [tokens]]
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "launch/weight_grad_sm90.h"
#include "tests/check_device.cuh"

using namespace pixelfly;

struct Case {
  int64_t T;
  int K, N;
  int b = 64, rank = 0;
  Kind kind = Kind::kButterfly;
  bool bias = true;
  double dense_ms = 0;
};

// out[i, j] = Σ over tokens of a[·, row(i)] b[·, col(j)], a block of rows x cols per block index.
struct Sum {
  const void *a, *b;  // [T, a_stride], [T, b_stride]; b null: ones
  int a_stride, b_stride;
  const int *row_idx, *col_idx;  // of blocks; null: one block
  int rows, cols;                // of a block
};

template <typename T>
__global__ void reference_sum(Sum s, int64_t tokens, float* out, size_t n) {
  const size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x;
  if (i >= n) return;
  const size_t block = i / (size_t(s.rows) * s.cols);
  const int row = int(i / s.cols % s.rows) + (s.row_idx ? s.row_idx[block] * s.rows : 0);
  const int col = int(i % s.cols) + (s.col_idx ? s.col_idx[block] * s.cols : 0);
  float sum = 0.f;
  if (row < s.a_stride && col < s.b_stride) {
    const T *a = static_cast<const T*>(s.a) + row, *b = static_cast<const T*>(s.b) + col;
    for (int64_t t = 0; t < tokens; ++t) {
      sum +=
          device::to_float(a[t * s.a_stride]) * (s.b ? device::to_float(b[t * s.b_stride]) : 1.f);
    }
  }
  out[i] = sum;
}

template <typename T>
int run(const Case& c, bool timing) {
  const LayoutView layout = make_layout(c.K, c.N, c.b, c.rank, c.kind);
  const DevicePlan plan(layout);
  const PlanHeader& h = plan.header;
  const DeviceInfo& device = plan.device;
  Arena<T> arena;
  const int sets = rotating_sets(timing, c.T, c.K + c.N);
  const size_t blocks = size_t(h.nnz) * c.b * c.b;
  WeightGradParams base{};
  base.dtype = base.grad_dtype = std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16;
  base.tokens = c.T;
  base.in_features = c.K;
  base.out_features = c.N;
  base.dz_stride = c.N;
  base.x_stride = c.K;
  base.t_stride = base.s_stride = c.rank;
  base.dblocks = arena.data(blocks, 0);
  if (c.rank) {
    base.du = arena.data(size_t(c.N) * c.rank, 0);
    base.dv = arena.data(size_t(c.K) * c.rank, 0);
  }
  if (c.bias) base.dbias = arena.data(c.N, 0);
  base.header = &h;
  base.plan = plan.data;
  std::vector<WeightGradParams> params(sets, base);
  for (int i = 0; i < sets; ++i) {
    WeightGradParams& p = params[i];
    p.x = arena.data(c.T * c.K, 11 + i);
    p.dz = arena.data(c.T * c.N, 31 + i);
    if (c.rank) {
      p.t = arena.data(c.T * c.rank, 51 + i);
      p.s = arena.data(c.T * c.rank, 71 + i);
    }
  }
  char name[160];
  std::snprintf(name, sizeof name, "T%ld %d->%d b%d r%d kind%d%s%s", long(c.T), c.K, c.N, c.b,
                c.rank, int(c.kind), c.bias ? " bias" : "",
                std::is_same_v<T, __half> ? " fp16" : "");
  if (!weight_grad_sm90_supports(params[0], device)) {
    std::printf("FAIL %s: not supported\n", name);
    return 1;
  }
  const size_t bytes_needed = weight_grad_workspace_sm90(params[0], device);
  void* workspace = arena.data(bytes_needed / sizeof(T) + 1, 0);
  for (WeightGradParams& p : params) p.workspace = workspace;
  auto launch = [&](int i, cudaStream_t stream) {
    const Status s = launch_weight_grad_sm90(params[i % sets], device, stream);
    if (s.ok()) return;
    std::printf("%s: %s\n", name, s.message.c_str());
    std::exit(1);
  };
  launch(0, nullptr);
  CHECK_CUDA(cudaDeviceSynchronize());

  const WeightGradParams& p = params[0];
  double error = 0, norm = 0, wrong = 0;
  auto compare_with = [&](const Sum& sum, const void* got, size_t n) {
    if (got == nullptr || n == 0) return;
    float* want;
    double sums[4], *device_sums;
    CHECK_CUDA(cudaMalloc(&want, n * 4));
    CHECK_CUDA(cudaMalloc(&device_sums, sizeof sums));
    CHECK_CUDA(cudaMemset(device_sums, 0, sizeof sums));
    reference_sum<T><<<unsigned((n + 127) / 128), 128>>>(sum, c.T, want, n);
    compare<<<512, 256>>>(want, static_cast<const T*>(got), n, device_sums);
    CHECK_CUDA(cudaGetLastError());
    CHECK_CUDA(cudaMemcpy(sums, device_sums, sizeof sums, cudaMemcpyDeviceToHost));
    cudaFree(want);
    cudaFree(device_sums);
    wrong += sums[2] + (sums[0] <= 1e-5 * sums[1] ? 0 : 1);
    error += sums[0], norm += sums[1];
  };
  compare_with(
      {p.dz, p.x, c.N, c.K, plan.data + h.row_idx_offset, plan.data + h.col_idx_offset, c.b, c.b},
      p.dblocks, blocks);
  compare_with({p.dz, p.t, c.N, c.rank, nullptr, nullptr, c.N, c.rank}, p.du, size_t(c.N) * c.rank);
  compare_with({p.s, p.x, c.rank, c.K, nullptr, nullptr, c.rank, c.K}, p.dv, size_t(c.K) * c.rank);
  compare_with({p.dz, nullptr, c.N, 1, nullptr, nullptr, c.N, 1}, p.dbias, c.N);
  if (wrong > 0 || !timing) {
    std::printf("%s %-50s err %.1e wrong %.0f\n", wrong > 0 ? "FAIL" : "ok  ", name,
                std::sqrt(error / std::max(norm, 1e-30)), wrong);
  }
  if (!timing || wrong > 0) return wrong > 0;

  const float ms = time_graph(launch, 12);
  const double flops = 2.0 * c.T * (double(blocks) + double(c.rank) * (c.K + c.N));
  const double bytes = 2.0 * c.T * (c.K + c.N + 2 * c.rank) + 2.0 * blocks;
  const double floor = std::max(flops / 790e12, bytes / 3e12) * 1e3;
  std::printf("%-46s %.4f ms %4.0f TF floor %.4f %3.0f%% %.2f TB/s x%.2f dense %.3f\n", name, ms,
              flops / ms * 1e-9, floor, 100 * floor / ms, bytes / ms * 1e-9, c.dense_ms / ms,
              c.dense_ms);
  return 0;
}

int check() {
  int bad = 0;
  for (const int b : {32, 64, 128}) {
    for (const Kind kind : {Kind::kButterfly, Kind::kRandom, Kind::kGlobal, Kind::kEmpty}) {
      for (const int rank : {0, 8, 64, 136}) {
        Case c{129, 512, 768, b, rank, kind};
        bad += run<__nv_bfloat16>(c, false);
        c.T = 1000, c.K = 456, c.N = 328;
        bad += run<__half>(c, false);
        c.T = 9000, c.K = 1600, c.N = 1600;
        bad += run<__nv_bfloat16>(c, false);
      }
    }
  }
  for (const int64_t T : {1, 7, 128, 4097, 70000}) {
    for (const Kind kind : {Kind::kButterfly, Kind::kFull}) {
      bad += run<__nv_bfloat16>({T, 1024, 512, 64, 64, kind}, false);
      bad += run<__half>({T, 200, 72, 64, 16, kind}, false);
    }
  }
  for (const auto& [K, N] :
       {std::pair{768, 3072}, {3072, 768}, {4096, 4096}, {2560, 10240}, {8192, 8192}}) {
    for (const Kind kind : {Kind::kButterfly, Kind::kGlobal}) {
      bad += run<__nv_bfloat16>({3000, K, N, 64, 64, kind}, false);
    }
  }
  std::printf("%d failures\n", bad);
  return bad;
}

int time_all(const std::string& filter, int64_t tokens) {
  struct Shape {
    int64_t T;
    int K, N;
    double dense;
  };
  const Shape shapes[] = {
      {25216, 768, 768, .0971},  {25216, 768, 3072, .2428}, {25216, 3072, 768, .2217},
      {16384, 1024, 1024, .088}, {16384, 1024, 4096, .239}, {16384, 4096, 1024, .219},
      {16384, 2048, 8192, .825}, {16384, 4096, 4096, .798}, {8192, 8192, 8192, 1.636}};
  int bad = 0;
  auto go = [&](const Case& c, const std::string& tag) {
    const std::string key = std::to_string(c.K) + "->" + std::to_string(c.N) + " " + tag;
    if (key.find(filter) != std::string::npos) bad += run<__nv_bfloat16>(c, true);
  };
  for (const Shape& s : shapes) {
    Case c{tokens > 0 ? tokens : s.T, s.K, s.N};
    if (tokens == 0) c.dense_ms = s.dense;
    go(c, "plain");
    c.rank = 64;
    go(c, "rank");
    c.rank = 0;
    c.kind = Kind::kGlobal;
    go(c, "global");
    c.kind = Kind::kButterfly;
    c.b = 128;
    go(c, "b128");
    c.b = 32;
    go(c, "b32");
  }
  for (const auto& [K, N] : {std::pair{1024, 4096}, {4096, 4096}, {4096, 16384}}) {
    go({tokens > 0 ? tokens : 8192, K, N, 64, 0, Kind::kQuarter}, "quarter");
  }
  return bad;
}

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const std::string mode = argc > 1 ? argv[1] : "check";
  if (mode != "time") return check();
  return time_all(argc > 2 ? argv[2] : "", argc > 3 ? std::atoll(argv[3]) : 0);
}
