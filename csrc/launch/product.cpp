// launch_product and launch_low_rank: choose a kernel and start it.
#include "launch/heuristics.h"
#include "launch/low_rank_sm90.h"
#include "launch/product_sm80.h"
#include "launch/product_sm90.h"

namespace pixelfly {
namespace {

bool low_rank_on_hopper(const LowRankParams& p, const DeviceInfo& device) {
  return forced_path() != Forced::kSm80 && low_rank_sm90_supports(p, device);
}

}  // namespace

Status launch_low_rank(const LowRankParams& p, const DeviceInfo& device, Stream stream) {
  if (p.tokens == 0 || p.rank == 0) return Status::success();
  return low_rank_on_hopper(p, device) ? launch_low_rank_sm90(p, device, stream)
                                       : launch_low_rank_sm80(p, device, stream);
}

Status launch_product(const ProductParams& p, const DeviceInfo& device, Stream stream) {
  if (p.tokens == 0) return Status::success();
  const Choice choice = choose_product(p, device, forced_path());
  if (!choice.status.ok()) return choice.status;

  // The kernels read t: form it first if it was not given.
  ProductParams given = p;
  if (p.factor_in != nullptr) {
    LowRankParams q{};
    q.dtype = p.dtype;
    q.allow_tf32 = p.allow_tf32;
    q.transposed = p.transposed;
    q.tokens = p.tokens;
    q.features = p.in_features;
    q.rank = p.header->rank;
    q.x = p.x;
    q.x_stride = p.x_stride;
    q.factor = p.factor_in;
    q.factor_stride = p.factor_in_stride;
    q.t = p.t;
    q.t_stride = p.t_stride;
    Status status = launch_low_rank(q, device, stream);
    if (!status.ok()) return status;
    given.factor_in = nullptr;
  }
  return choice.path == Path::kHopper ? launch_product_sm90(given, device, stream)
                                      : launch_product_sm80(given, device, stream);
}

std::string explain_product(const ProductParams& p, const DeviceInfo& device) {
  const Choice choice = choose_product(p, device, forced_path());
  return choice.status.ok() ? std::string("product_") + name_of(choice.path)
                            : choice.status.message;
}

std::string explain_low_rank(const LowRankParams& p, const DeviceInfo& device) {
  if (p.rank == 0) return "none";
  return low_rank_on_hopper(p, device) ? "low_rank_sm90"
                                       : "product_sm80 over the low-rank term alone";
}

}  // namespace pixelfly
