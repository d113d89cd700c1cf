// A gradient that comes as three matrices side by side, on the emulator: dx, s and the gradients of
// weights must be, bit for bit, those of the same gradient in one matrix, which test_kernels.cpp
// compares with sums in double.
//
//   test_thirds [words...]  only the cases whose name contains every word
#include <cstdlib>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "kernel_cases.h"
#include "launch/product_split_sm90.h"

namespace pixelfly {
namespace {

using emulator::Eagerness;

// Rows are out_features: their thirds are whole tiles of 64.
std::vector<Case> thirds_cases() {
  std::vector<Case> all = {
      {"b64", 6, 4, 64, 0, 24, butterfly, 300, 0},
      {"b64 rank 16", 6, 4, 64, 0, 0, global, 300, 16},
      {"b64 rank 136 many units", 3, 2, 64, 0, 0, everything, 700, 136, Activation::kNone, false,
       false, 90, 2},
      {"b64 holes", 9, 5, 64, 0, 8, holes, 420, 8},
      {"b64 cooperative", 24, 3, 64, 0, 16, everything, 620, 0, Activation::kNone, false, false, 90,
       2},
      {"b64 s by clusters of 2", 18, 2, 64, 0, 0, lines, 130, 8, Activation::kNone, false, false,
       90, 8},
      {"b64 rows alone", 36, 4, 64, 0, 8, bands_down, 300, 8},
      {"b128 thirds of a block and a half", 5, 2, 128, 64, 0, everything, 300, 24},
      {"b128 thirds of half a block", 2, 3, 128, 64, 88, everything, 290, 0},
      {"b32 rank 40", 6, 5, 32, 0, 8, butterfly, 300, 40},
      {"b32 cooperative", 48, 4, 32, 0, 0, everything, 300, 0, Activation::kNone, false, false, 90,
       1},
  };
  all.push_back({"b64 few", 9, 8, 64, 0, 24, butterfly, 300, 0});
  all.back().few = true;
  const Case split[] = {{"b64 split", 6, 9, 64, 0, 8, global, 300, 24},
                        {"b64 split long", 6, 9, 64, 0, 8, global, 300, 24},
                        {"b128 split", 5, 2, 128, 64, 0, everything, 300, 0}};
  for (const Case& c : split) {
    all.push_back(c);
    all.back().warpgroups = 2;
    all.back().cluster = 4;
    all.back().long_only = c.name == "b64 split long";
  }
  return all;
}

template <typename T>
bool same(const Tensor<T>& a, const Tensor<T>& b) {
  return a.data.size() == b.data.size() &&
         std::memcmp(a.data.data(), b.data.data(), a.data.size() * sizeof(T)) == 0;
}

template <typename T>
class Thirds {
 public:
  explicit Thirds(const Case& c) : c_(c), n_(c.n()), k_(c.k()) {
    layout_ = layout_of(c);
    plan_ = build_plan(layout_);
    header_ = header_of(c, plan_);
    device_ = {0, c.arch, c.sms, static_cast<int32_t>(emulator::kSharedLimit)};
    x_ = Tensor<T>::random(c.tokens, k_, 1, rng_);
    t_ = Tensor<T>::random(c.tokens, c.rank, 1, rng_);
    blocks_ = Tensor<T>::random(int64_t{layout_.nnz()} * c.block, c.block, 0.1, rng_);
    u_ = Tensor<T>::random(n_, c.rank, 0.3, rng_);
    v_ = Tensor<T>::random(c.rank, k_, 0.1, rng_);
    dy_ = Tensor<T>::random(c.tokens, n_, 1, rng_);
    // Rows of different strides, with NaN beyond their third.
    for (int p = 0; p < 3; ++p) {
      thirds_[p] = Tensor<T>(c.tokens, n_ / 3 + 8 * p);
      for (int i = 0; i < c.tokens; ++i) {
        for (int j = 0; j < n_ / 3; ++j) thirds_[p].set(i, j, dy_.at(i, p * (n_ / 3) + j));
      }
    }
  }

  void run() {
    Results one = results(false), three = results(true);
    expect(same(one.dx, three.dx), "dx");
    expect(same(one.s, three.s), "s");
    expect(same(one.alone, three.alone) && (c_.rank == 0 || same(one.s, one.alone)), "s alone");
    expect(same(one.dblocks, three.dblocks), "dblocks");
    expect(same(one.du, three.du), "du");
    expect(same(one.dv, three.dv), "dv");
    expect(same(one.dbias, three.dbias), "dbias");
    const DType other = DType::kFloat32;
    DeviceInfo older = device_;
    older.arch = 80;
    expect(takes_thirds(kType, c_.tokens, header_, device_), "takes_thirds");
    expect(!takes_thirds(other, c_.tokens, header_, device_), "takes_thirds of float32");
    expect(!takes_thirds(kType, c_.tokens, header_, older), "takes_thirds on sm_80");
    expect(!takes_thirds(kType, 32, header_, device_), "takes_thirds of few tokens");
    device_ = older;
    Results none(*this);
    expect_refusal(product(none, true), "thirds");
    if (c_.rank > 0) expect_refusal(low_rank(none, true), "thirds");
    expect_refusal(weight_grad(none, true), "thirds");
  }

 private:
  static constexpr DType kType =
      std::is_same_v<T, __nv_bfloat16> ? DType::kBFloat16 : DType::kFloat16;

  struct Results {
    Tensor<T> dx, s, alone;
    Tensor<float> dblocks, du, dv, dbias;

    explicit Results(const Thirds& of)
        : dx(of.c_.tokens, of.k_),
          s(of.c_.tokens, of.c_.rank),
          alone(of.c_.tokens, of.c_.rank),
          dblocks(of.blocks_.rows, of.c_.block),
          du(of.n_, of.c_.rank),
          dv(of.c_.rank, of.k_),
          dbias(1, of.n_) {}
  };

  void expect(bool holds, const char* what) {
    if (holds) return;
    ++g_failures;
    std::printf("FAILED %s: %s\n", c_.name.c_str(), what);
  }

  const void* first(bool thirds) { return (thirds ? thirds_[0] : dy_).pointer(); }
  int64_t stride(bool thirds) const { return (thirds ? thirds_[0] : dy_).stride; }
  OtherThirds others(bool thirds) {
    if (!thirds) return {};
    return {{thirds_[1].pointer(), thirds_[2].pointer()}, {thirds_[1].stride, thirds_[2].stride}};
  }

  Status product(Results& out, bool thirds) {
    ProductParams p{};
    p.dtype = kType;
    p.transposed = true;
    p.tokens = c_.tokens;
    p.in_features = n_;
    p.out_features = k_;
    p.x = first(thirds);
    p.x_stride = stride(thirds);
    p.x_others = others(thirds);
    p.blocks = blocks_.pointer();
    if (c_.rank > 0) {
      p.factor_in = u_.pointer();
      p.factor_in_stride = u_.stride;
      p.factor = v_.pointer();
      p.factor_stride = v_.stride;
      p.t = out.s.pointer();
      p.t_stride = out.s.stride;
    }
    p.y = out.dx.pointer();
    p.y_stride = out.dx.stride;
    p.header = &header_;
    p.plan = plan_.data();
    if (c_.warpgroups > 0 && product_split_sm90_supports(p, device_)) {
      Status status = launch_low_rank(low_rank_of(p), device_, nullptr);
      if (!status.ok()) return status;
      return launch_product_split_sm90(p, {c_.warpgroups, c_.cluster, c_.long_only}, device_,
                                       nullptr);
    }
    std::vector<float> workspace((product_workspace(p, device_) + 3) / 4, NAN);
    p.workspace = workspace.empty() ? nullptr : workspace.data();
    return launch_product(p, device_, nullptr);
  }

  Status low_rank(Results& out, bool thirds) {
    LowRankParams p{};
    p.dtype = kType;
    p.transposed = true;
    p.tokens = c_.tokens;
    p.features = n_;
    p.rank = c_.rank;
    p.x = first(thirds);
    p.x_stride = stride(thirds);
    p.x_others = others(thirds);
    p.factor = u_.pointer();
    p.factor_stride = u_.stride;
    p.t = out.alone.pointer();
    p.t_stride = out.alone.stride;
    return launch_low_rank(p, device_, nullptr);
  }

  Status weight_grad(Results& out, bool thirds) {
    WeightGradParams p{};
    p.dtype = kType;
    p.grad_dtype = DType::kFloat32;
    p.tokens = c_.tokens;
    p.in_features = k_;
    p.out_features = n_;
    p.dz = first(thirds);
    p.dz_stride = stride(thirds);
    p.dz_others = others(thirds);
    p.x = x_.pointer();
    p.x_stride = x_.stride;
    if (c_.rank > 0) {
      p.t = t_.pointer();
      p.t_stride = t_.stride;
      p.s = out.s.pointer();
      p.s_stride = out.s.stride;
      p.du = out.du.pointer();
      p.dv = out.dv.pointer();
    }
    p.dblocks = out.dblocks.pointer();
    p.dbias = out.dbias.pointer();
    p.header = &header_;
    p.plan = plan_.data();
    std::vector<float> workspace(weight_grad_workspace(p, device_) / sizeof(float) + 1, NAN);
    p.workspace = workspace.data();
    return launch_weight_grad(p, device_, nullptr);
  }

  Results results(bool thirds) {
    Results out(*this);
    check(product(out, thirds));
    check(low_rank(out, thirds));
    check(weight_grad(out, thirds));
    return out;
  }

  const Case& c_;
  const int n_, k_;
  std::mt19937 rng_{20211130};
  LayoutView layout_;
  std::vector<int32_t> plan_;
  PlanHeader header_;
  DeviceInfo device_;
  Tensor<T> x_, t_, blocks_, u_, v_, dy_, thirds_[3];
};

}  // namespace
}  // namespace pixelfly

int main(int argc, char** argv) {
  using namespace pixelfly;
  int ran = 0;
  for (Case c : thirds_cases()) {
    const std::string name = c.name;
    for (const Mood& mood : kMoods) {
      const bool half = mood.eagerness == Eagerness::kEarly;  // one dtype a mood is enough
      c.name = name + " " + mood.name + (half ? " fp16" : " bf16");
      if (!wanted(c.name, argc, argv)) continue;
      emulator::configure(mood.seed, mood.eagerness);
      try {
        if (half) {
          Thirds<__half>(c).run();
        } else {
          Thirds<__nv_bfloat16>(c).run();
        }
      } catch (const std::exception& error) {
        ++g_failures;
        std::printf("FAILED %s: %s\n", c.name.c_str(), error.what());
      }
      ++ran;
    }
  }
  std::printf("thirds on the emulator: %d runs, %d failures\n", ran, g_failures);
  return g_failures == 0 && ran > 0 ? 0 : 1;
}
