#include "launch/explain.h"

namespace pixelfly {
namespace {

// An aligned address nobody reads: choosing a kernel looks at alignment and presence only.
void* somewhere() { return reinterpret_cast<void*>(uintptr_t{1} << 20); }

int64_t padded(int64_t columns) { return (columns + 7) / 8 * 8; }

ProductParams product(const ExplainedCall& call, const PlanHeader& h, bool transposed) {
  const bool low_rank = h.rank > 0;
  ProductParams p{};
  p.dtype = call.dtype;
  p.allow_tf32 = call.allow_tf32;
  p.transposed = transposed;
  p.tokens = call.tokens;
  p.in_features = transposed ? h.out_features : h.in_features;
  p.out_features = transposed ? h.in_features : h.out_features;
  p.x = p.blocks = p.y = somewhere();
  p.x_stride = p.in_features;
  p.y_stride = p.out_features;
  p.header = &h;
  if (low_rank) {
    p.factor_in = p.factor = p.t = somewhere();
    p.factor_in_stride = transposed ? h.rank : h.in_features;
    p.factor_stride = transposed ? h.in_features : h.rank;
    p.t_stride = padded(h.rank);
  }
  if (!transposed) p.activation = call.activation;
  return p;
}

WeightGradParams weight_grad(const ExplainedCall& call, const PlanHeader& h) {
  WeightGradParams p{};
  p.dtype = call.dtype;
  p.allow_tf32 = call.allow_tf32;
  p.deterministic = call.deterministic;
  p.tokens = call.tokens;
  p.in_features = h.in_features;
  p.out_features = h.out_features;
  p.dz = p.x = p.dblocks = p.dbias = somewhere();
  p.dz_stride = h.out_features;
  p.x_stride = h.in_features;
  if (h.rank > 0) {
    p.t = p.s = p.du = p.dv = somewhere();
    p.t_stride = p.s_stride = padded(h.rank);
  }
  p.header = &h;
  return p;
}

}  // namespace

std::vector<std::pair<std::string, std::string>> explain_call(const ExplainedCall& call,
                                                              const PlanHeader& header,
                                                              const DeviceInfo& device) {
  std::vector<std::pair<std::string, std::string>> steps;
  auto explain = [&](const char* t, const char* y, bool transposed) {
    const ProductParams p = product(call, header, transposed);
    if (header.rank > 0) steps.emplace_back(t, explain_low_rank(p, device));
    steps.emplace_back(y, explain_product(p, device));
  };
  explain("t", "y", false);
  if (call.activation != Activation::kNone) steps.emplace_back("dz", "activation_grad_sm80");
  explain("s", "dx", true);
  steps.emplace_back("dblocks, du, dv, dbias",
                     explain_weight_grad(weight_grad(call, header), device));
  return steps;
}

}  // namespace pixelfly
