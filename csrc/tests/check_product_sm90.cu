// Checks product_sm90 element by element against a naive kernel, and times it. No torch needed.
//
//   nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -Icsrc -Icsrc/include
//        csrc/tests/check_product_sm90.cu csrc/launch/product_sm90.cu csrc/launch/low_rank_sm90.cu
//        csrc/launch/tensor_map.cpp csrc/planner/*.cpp -o check_product_sm90
//   ./check_product_sm90 check | time | time <case substring>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "launch/low_rank_sm90.h"
#include "launch/product_sm90.h"
#include "tests/check_device.cuh"

using namespace pixelfly;

struct Case {
  int64_t T;
  int K, N;
  int b = 64, rank = 0;
  Kind kind = Kind::kButterfly;
  bool transposed = false, bias = true, residual = false, slope = false, slope_out = false;
  Activation activation = Activation::kNone;
  double dense_ms = 0;
  bool form_t = false;  // launch the low-rank kernel first
};

template <typename T>
int run(const Case& c, bool timing) {
  const LayoutView layout = make_layout(c.K, c.N, c.b, c.rank, c.kind);
  const DevicePlan plan(layout);
  const PlanHeader& h = plan.header;
  const DeviceInfo& device = plan.device;
  Arena<T> arena;
  const int in = c.transposed ? c.N : c.K, out = c.transposed ? c.K : c.N;
  const int sets = rotating_sets(timing, c.T, in + out);
  ProductParams base{};
  base.dtype = std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16;
  base.transposed = c.transposed;
  base.tokens = c.T;
  base.in_features = in;
  base.out_features = out;
  base.x_stride = in;
  base.blocks = arena.data(size_t(h.nnz) * c.b * c.b, 51, .06f);
  base.t_stride = c.rank;
  base.factor = c.rank ? arena.data(size_t(out) * c.rank, 52, .1f) : nullptr;
  base.factor_stride = c.transposed ? out : c.rank;
  base.bias = c.bias && !c.transposed ? arena.data(out, 54) : nullptr;
  using Slope = device::SlopeOf<T>;
  const int64_t slope_stride = (out + 15) / 16 * 16;
  base.residual_stride = base.y_stride = out;
  base.slope_stride = base.slope_out_stride = slope_stride;
  base.activation = c.activation;
  base.header = &h;
  base.plan = plan.data;
  if (c.form_t) {
    base.factor_in = arena.data(size_t(in) * c.rank, 53, 1.f / std::sqrt(in));
    base.factor_in_stride = c.transposed ? c.rank : in;
  }
  std::vector<ProductParams> params(sets, base);
  for (int i = 0; i < sets; ++i) {
    ProductParams& p = params[i];
    p.x = arena.data(c.T * in, 11 + i);
    if (c.rank) p.t = arena.data(c.T * c.rank, c.form_t ? 0 : 31 + i);
    if (c.residual) p.residual = arena.data(c.T * out, 77 + i);
    if (c.slope) p.slope = arena.template slopes<Slope>(c.T * slope_stride, 87 + i);
    p.y = arena.data(c.T * out, 0);
    if (product_sm90_forms_t(p, device)) {
      p.workspace = arena.data(product_workspace_sm90(p) / sizeof(T), 0);
    }
    if (c.slope_out) p.slope_out = arena.template slopes<Slope>(c.T * slope_stride, 0);
  }

  char name[160];
  std::snprintf(name, sizeof name, "T%ld %d->%d b%d r%d %s kind%d act%d%s%s%s%s%s", long(c.T), c.K,
                c.N, c.b, c.rank, c.transposed ? "dx " : "fwd", int(c.kind), int(c.activation),
                c.bias ? " bias" : "", c.slope_out ? " save" : "", c.residual ? " res" : "",
                c.slope ? " slope" : "",
                std::is_same_v<T, __half> ? " fp16"
                : c.form_t                ? " +t"
                                          : "");
  if (!product_sm90_supports(params[0], device)) {
    std::printf("FAIL %s: not supported\n", name);
    return 1;
  }
  auto must = [&](const Status& s) {
    if (s.ok()) return;
    std::printf("%s: %s\n", name, s.message.c_str());
    std::exit(1);
  };
  auto launch = [&](int i, cudaStream_t stream) {
    ProductParams p = params[i % sets];
    if (c.form_t && !product_sm90_forms_t(p, device)) {
      must(launch_low_rank_sm90(low_rank_of(p), device, stream));
      p.factor_in = nullptr;
    }
    must(launch_product_sm90(p, device, stream));
  };
  launch(0, nullptr);
  CHECK_CUDA(cudaDeviceSynchronize());

  const ProductParams& p = params[0];
  const Operand o{p.x,
                  p.blocks,
                  p.t,
                  p.factor,
                  p.bias,
                  p.residual,
                  p.slope,
                  plan.data + (c.transposed ? h.col_ptr_offset : h.row_ptr_offset),
                  plan.data + (c.transposed ? h.t_row_offset : h.col_idx_offset),
                  c.transposed ? plan.data + h.t_block_offset : nullptr,
                  in,
                  out,
                  c.b,
                  c.rank,
                  c.transposed,
                  c.activation,
                  slope_stride};
  double sums[8];
  double* device_sums;
  float *want_y, *want_slope;
  const int64_t chunk = std::min<int64_t>(c.T, 4096);
  CHECK_CUDA(cudaMalloc(&device_sums, sizeof sums));
  CHECK_CUDA(cudaMemset(device_sums, 0, sizeof sums));
  CHECK_CUDA(cudaMalloc(&want_y, chunk * out * 4));
  CHECK_CUDA(cudaMalloc(&want_slope, chunk * out * 4));
  arena.all.insert(arena.all.end(), {device_sums, want_y, want_slope});
  for (int64_t first = 0; first < c.T; first += chunk) {
    const int64_t n = std::min(chunk, c.T - first);
    reference<T>
        <<<dim3((out + 63) / 64, (n + 3) / 4), dim3(64, 4)>>>(o, want_y, want_slope, first, n);
    compare<<<512, 256>>>(want_y, static_cast<const T*>(p.y) + first * out, n * out, device_sums);
    if (!c.slope_out) continue;
    compare<<<512, 256>>>(want_slope, static_cast<const Slope*>(p.slope_out) + first * slope_stride,
                          n * out, device_sums + 4, out, slope_stride);
  }
  if (c.form_t) {
    float* want_t;
    CHECK_CUDA(cudaMalloc(&want_t, c.T * c.rank * 4));
    arena.all.push_back(want_t);
    reference_t<T><<<(c.T * c.rank + 255) / 256, 256>>>(static_cast<const T*>(p.x),
                                                        static_cast<const T*>(p.factor_in), in,
                                                        c.rank, c.transposed, want_t, c.T);
    compare<<<512, 256>>>(want_t, static_cast<const T*>(p.t), c.T * c.rank, device_sums + 4);
  }
  CHECK_CUDA(cudaGetLastError());
  CHECK_CUDA(cudaMemcpy(sums, device_sums, sizeof sums, cudaMemcpyDeviceToHost));
  bool bad = false;
  for (int i = 0; i < 8; i += 4) {
    bad |= sums[i + 2] > 0 || sums[i + 3] > 0 || !(sums[i] <= 1e-5 * sums[i + 1]);
  }
  auto relative = [&](int i) { return std::sqrt(sums[i] / std::max(sums[i + 1], 1e-30)); };
  if (bad || !timing) {
    std::printf("%s %-60s err %.1e nan %.0f out %.0f | slope %.1e %.0f %.0f\n",
                bad ? "FAIL" : "ok  ", name, relative(0), sums[2], sums[3], relative(4), sums[6],
                sums[7]);
  }
  if (!timing || bad) return bad;

  const float ms = time_graph(launch, 12);
  const double flops = 2.0 * c.T * (double(h.nnz) * c.b * c.b + double(c.rank) * out);
  const double bytes = 2.0 * c.T * (in + out * (1.0 + c.residual) + c.rank) +
                       double(sizeof(Slope)) * c.T * out * (c.slope_out + c.slope) +
                       2.0 * h.nnz * c.b * c.b;
  const double floor = std::max(flops / 790e12, bytes / 3e12) * 1e3;
  std::printf("%-56s %.4f ms %4.0f TF floor %.4f %3.0f%% %.2f TB/s x%.2f dense %.3f\n", name, ms,
              flops / ms * 1e-9, floor, 100 * floor / ms, bytes / ms * 1e-9, c.dense_ms / ms,
              c.dense_ms);
  return 0;
}

int check() {
  int bad = 0;
  for (const bool transposed : {false, true}) {
    for (const int b : {32, 64, 128}) {
      for (const Kind kind : {Kind::kButterfly, Kind::kRandom, Kind::kGlobal, Kind::kEmpty}) {
        for (const int rank : {0, 8, 64, 136}) {
          Case c{129, 512, 768, b, rank, kind, transposed};
          bad += run<__nv_bfloat16>(c, false);
          c.T = 1000, c.K = 456, c.N = 328;
          bad += run<__nv_bfloat16>(c, false);
        }
      }
    }
    for (const int64_t T : {1, 7, 128, 4097, 70000}) {
      for (const Kind kind : {Kind::kButterfly, Kind::kFull}) {
        bad += run<__nv_bfloat16>({T, 1024, 512, 64, 64, kind, transposed}, false);
        bad += run<__half>({T, 200, 72, 64, 16, kind, transposed}, false);
      }
    }
    for (const int rank : {8, 64, 136}) {
      for (const int64_t T : {1, 100, 5000}) {
        Case c{T, 1000, 456, 64, rank, Kind::kButterfly, transposed};
        c.form_t = true;
        bad += run<__nv_bfloat16>(c, false);
        bad += run<__half>(c, false);
      }
    }
    for (int a = 0; a <= 4; ++a) {
      Case c{4000, 512, 1024, 64, 64, Kind::kButterfly, transposed};
      if (!transposed) c.activation = static_cast<Activation>(a);
      c.residual = true;
      c.slope_out = !transposed;
      bad += run<__nv_bfloat16>(c, false);
      c.K = 1000, c.N = 1608, c.slope_out = !transposed && a == 3;
      // Not ReLU's once more: where fp32 sums of another order cross zero, its slope jumps.
      c.residual = !transposed && a == 4;
      c.slope = transposed;
      bad += run<__nv_bfloat16>(c, false);
      bad += run<__half>(c, false);
    }
    for (const auto& [K, N] : {std::pair{768, 3072},
                               {3072, 768},
                               {4096, 4096},
                               {2560, 10240},
                               {8192, 8192},
                               {1600, 6400},
                               {16384, 17000}}) {
      bad += run<__nv_bfloat16>({3000, K, N, 64, 64, Kind::kButterfly, transposed}, false);
    }
    bad += run<__nv_bfloat16>({3000, 4096, 4096, 64, 0, Kind::kGlobal, transposed}, false);
  }
  std::printf("%d failures\n", bad);
  return bad;
}

int time_all(const std::string& filter) {
  struct Shape {
    int64_t T;
    int K, N;
    double dense, dense_dx;
  };
  const Shape shapes[] = {{25216, 768, 768, .053, .052},  {25216, 768, 3072, .19, .18},
                          {25216, 3072, 768, .174, .19},  {16384, 1024, 1024, .057, .055},
                          {16384, 1024, 4096, .21, .20},  {16384, 4096, 1024, .197, .21},
                          {16384, 2048, 8192, .845, .79}, {16384, 4096, 4096, .81, .81},
                          {8192, 8192, 8192, 1.57, 1.58}, {16384, 1280, 1280, .09, .09},
                          {16384, 2048, 2048, .21, .21},  {16384, 1024, 3072, .16, .16}};
  int bad = 0;
  auto go = [&](const Case& c, const std::string& tag) {
    const std::string key =
        std::to_string(c.K) + "->" + std::to_string(c.N) + (c.transposed ? " dx " : " fwd ") + tag;
    if (key.find(filter) != std::string::npos) bad += run<__nv_bfloat16>(c, true);
  };
  for (const Shape& s : shapes) {
    Case c{s.T, s.K, s.N};
    c.dense_ms = s.dense;
    go(c, "plain");
    c.rank = 64;
    go(c, "rank");
    c.form_t = true;
    go(c, "rank+t");
    c.form_t = false;
    c.rank = 0;
    c.kind = Kind::kGlobal;
    go(c, "global");
    c.activation = Activation::kGelu;
    c.slope_out = true;
    go(c, "global save");
    c.slope_out = false;
    c.kind = Kind::kButterfly;
    go(c, "gelu");
    c.slope_out = true;
    go(c, "save");
    c.activation = Activation::kGeluTanh;
    go(c, "save tanh");
    c = Case{s.T, s.K, s.N};
    c.residual = true;
    c.dense_ms = s.dense;
    go(c, "residual");
    c = Case{s.T, s.K, s.N};
    c.dense_ms = s.dense_dx;
    c.transposed = true;
    c.bias = false;
    go(c, "plain");
    c.rank = 64;
    c.form_t = true;
    go(c, "rank+t");
    c.rank = 0;
    c.form_t = false;
    c.slope = true;
    go(c, "slope");
    c.kind = Kind::kGlobal;
    go(c, "global slope");
    c.slope = false;
    go(c, "global");
    c = Case{s.T, s.K, s.N, 128};
    c.dense_ms = s.dense;
    go(c, "b128");
    c.b = 32;
    go(c, "b32");
  }
  for (const int64_t T : {4096, 8192}) {
    for (const auto& [K, N] : {std::pair{768, 768},
                               {3072, 768},
                               {1024, 1024},
                               {4096, 1024},
                               {1280, 5120},
                               {4096, 4096}}) {
      for (const bool transposed : {false, true}) {
        go({T, K, N, 64, 0, Kind::kGlobal, transposed, !transposed}, "short global");
        if (N == 768)
          go({T, K, N, 64, 0, Kind::kButterfly, transposed, !transposed}, "short plain");
      }
    }
  }
  struct Mlp {
    int64_t T;
    int narrow, wide;
  };
  for (const Mlp& m : {Mlp{8192, 1024, 4096}, {25216, 768, 3072}, {8192, 4096, 16384}}) {
    for (const auto& [K, N] : {std::pair{m.narrow, m.wide}, {m.wide, m.narrow}}) {
      for (const bool transposed : {false, true}) {
        Case c{m.T, K, N, 64, 0, Kind::kMlp, transposed, !transposed};
        go(c, "mlp plain");
        c.activation = transposed ? Activation::kNone : Activation::kGelu;
        c.slope_out = !transposed;
        c.slope = transposed;
        if (transposed == (K > N)) go(c, "mlp slopes");
      }
    }
  }
  for (const auto& [K, N] : {std::pair{1024, 4096}, {4096, 4096}, {4096, 16384}, {16384, 4096}}) {
    for (const bool transposed : {false, true}) {
      Case c{8192, K, N, 64, 0, Kind::kQuarter, transposed};
      go(c, "quarter");
      c.activation = transposed ? Activation::kNone : Activation::kGelu;
      c.bias = c.slope_out = !transposed;
      c.slope = transposed;
      go(c, transposed ? "quarter slope" : "quarter save");
    }
  }
  return bad;
}

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const std::string mode = argc > 1 ? argv[1] : "check";
  return mode == "time" ? time_all(argc > 2 ? argv[2] : "") : check();
}
