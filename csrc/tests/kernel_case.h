// What test_kernels.cpp is made of: a call's description, tensors in storage types, comparisons.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "device/convert.cuh"
#include "device/slope_code.cuh"
#include "pixelfly/launch.h"
#include "pixelfly/schedule.h"

namespace pixelfly {

using Keep = std::function<bool(int, int)>;

struct Case {
  std::string name;
  int rows, cols, block, row_tail, col_tail;
  Keep keep;
  int tokens, rank;
  Activation activation = Activation::kNone;
  bool residual = false, save_slope = false;
  int arch = 90, sms = 3;
  const char* path = "sm90";
  bool nan = false;                        // in the bias of one feature, and in some slopes
  int thread_blocks = kUsualThreadBlocks;  // that the plan is for
  int cluster = 1;                         // the largest that a kernel must have run in
  int warpgroups = 0;      // of product_split_sm90's tile, with that cluster; 0: who calls chooses
  bool long_only = false;  // of that tile
  bool few = false;        // by the plan's rows alone for few tokens, not by its groups for many
  int ahead = 0;           // thread blocks that form t and s beside the product; 0: the plan's

  int n() const { return rows * block - row_tail; }
  int k() const { return cols * block - col_tail; }
};

// A matrix in storage type T, NaN until written. Its rows are multiples of 16 bytes.
template <typename T>
struct Tensor {
  int64_t rows = 0, cols = 0, stride = 0;
  std::vector<T> data;

  Tensor() = default;
  Tensor(int64_t r, int64_t c) : rows(r), cols(c) {
    constexpr int64_t kVec = 16 / sizeof(T);
    stride = (c + kVec - 1) / kVec * kVec;
    data.resize(static_cast<size_t>(r * stride + 8));
    std::memset(static_cast<void*>(data.data()), 0xff, data.size() * sizeof(T));  // nobody wrote it
  }
  static Tensor random(int64_t r, int64_t c, double scale, std::mt19937& rng) {
    Tensor t(r, c);
    std::normal_distribution<float> normal(0, static_cast<float>(scale));
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t j = 0; j < c; ++j) t.set(i, j, normal(rng));
    }
    return t;
  }
  static Tensor uniform(int64_t r, int64_t c, double low, double high, std::mt19937& rng) {
    Tensor t(r, c);
    std::uniform_real_distribution<float> in(static_cast<float>(low), static_cast<float>(high));
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t j = 0; j < c; ++j) t.set(i, j, in(rng));
    }
    return t;
  }
  double at(int64_t r, int64_t c) const {
    return device::to_float(data[static_cast<size_t>(r * stride + c)]);
  }
  void set(int64_t r, int64_t c, double x) {
    data[static_cast<size_t>(r * stride + c)] = device::from_float<T>(static_cast<float>(x));
  }
  // Aligned to 16 bytes, as every allocation.
  T* pointer() { return data.data(); }
};

using Matrix = std::vector<std::vector<double>>;

inline int g_failures = 0;

template <typename T>
void compare(const Case& c, const char* what, const Tensor<T>& got, const Matrix& want,
             double tolerance) {
  double largest = 1e-3, worst = 0;
  int64_t at_row = -1, at_col = -1;
  for (const auto& row : want) {
    for (double v : row) largest = std::max(largest, std::fabs(v));
  }
  for (int64_t i = 0; i < got.rows; ++i) {
    for (int64_t j = 0; j < got.cols; ++j) {
      const double expected = want[static_cast<size_t>(i)][static_cast<size_t>(j)];
      double error = std::fabs(got.at(i, j) - expected) / largest;
      if (std::isnan(error)) error = std::isnan(expected) && std::isnan(got.at(i, j)) ? 0 : 1e30;
      if (error > worst) {
        worst = error;
        at_row = i;
        at_col = j;
      }
    }
  }
  if (worst <= tolerance) return;
  ++g_failures;
  std::printf("FAILED %s: %s differs by %.2e of its largest value at (%lld, %lld)\n",
              c.name.c_str(), what, worst, static_cast<long long>(at_row),
              static_cast<long long>(at_col));
}

inline Matrix zeros(int64_t rows, int64_t cols) {
  return Matrix(static_cast<size_t>(rows), std::vector<double>(static_cast<size_t>(cols), 0.0));
}

// a [m, k] times b [n, k], transposed.
template <typename F, typename G>
Matrix product(int m, int n, int k, F a, G b) {
  Matrix out = zeros(m, n), right = zeros(k, n);
  for (int j = 0; j < n; ++j) {
    for (int l = 0; l < k; ++l) right[static_cast<size_t>(l)][static_cast<size_t>(j)] = b(j, l);
  }
  for (int i = 0; i < m; ++i) {
    double* sums = out[static_cast<size_t>(i)].data();
    for (int l = 0; l < k; ++l) {
      const double x = a(i, l), *y = right[static_cast<size_t>(l)].data();
      for (int j = 0; j < n; ++j) sums[j] += x * y[j];
    }
  }
  return out;
}

// The plan's header, which leads a product of few tokens to the groups that the case asks for.
inline PlanHeader header_of(const Case& c, const std::vector<int32_t>& plan) {
  PlanHeader header;
  std::memcpy(&header, plan.data(), sizeof(header));
  const bool any = header.forward_few.num_groups > 0 || header.transposed_few.num_groups > 0;
  if (c.few && !any) throw std::runtime_error(c.name + ": the plan has no rows alone");
  if (!c.few) header.forward_few.num_groups = header.transposed_few.num_groups = 0;
  if (c.ahead > 0) header.forward.ahead_blocks = header.transposed.ahead_blocks = c.ahead;
  return header;
}

// A launcher's refusal, which must speak of `word`.
inline void expect_refusal(const Status& status, const char* word) {
  if (!status.ok() && status.message.find(word) != std::string::npos) return;
  ++g_failures;
  std::printf("FAILED refusals: '%s' does not speak of '%s'\n", status.message.c_str(), word);
}

inline void check(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message);
}

// Calls Run<T>{shape, case, device}.run() for every shape and 16-bit type, each with another seed
// and eagerness of the emulator. Returns main's status.
template <template <typename> class Run, typename Shape, size_t kShapes>
int run_each(const char* what, const Shape (&shapes)[kShapes]) {
  int ran = 0;
  for (const Shape& s : shapes) {
    for (const bool half : {false, true}) {
      const auto eagerness = static_cast<emulator::Eagerness>(ran % 3);
      const DeviceInfo device{0, 90, s.sms, static_cast<int32_t>(emulator::kSharedLimit)};
      Case c{};
      c.name = std::string(s.name) + (half ? " fp16" : " bf16");
      emulator::configure(static_cast<uint64_t>(++ran), eagerness);
      try {
        if (half) {
          Run<__half>{s, c, device}.run();
        } else {
          Run<__nv_bfloat16>{s, c, device}.run();
        }
      } catch (const std::exception& error) {
        ++g_failures;
        std::printf("FAILED %s: %s\n", c.name.c_str(), error.what());
      }
    }
  }
  std::printf("%s on the emulator: %d runs, %d failures\n", what, ran, g_failures);
  return g_failures == 0 ? 0 : 1;
}

}  // namespace pixelfly
