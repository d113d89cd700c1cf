#include "launch/heuristics.h"

#include <cstdlib>
#include <cstring>

#include "launch/product_few_sm80.h"
#include "launch/product_sm90.h"
#include "launch/weight_grad_sm90.h"

namespace pixelfly {
namespace {

Status cannot(const char* forced, const char* what) {
  return Status::unsupported(std::string("PIXELFLY_KERNEL=") + forced + " cannot serve this " +
                             what +
                             ": it needs a Hopper GPU, a 16-bit dtype, 16-byte aligned rows "
                             "and a block size and rank that the kernel covers");
}

}  // namespace

const char* name_of(Path path) {
  switch (path) {
    case Path::kHopper: return "sm90";
    case Path::kFew: return "few_sm80";
    default: return "sm80";
  }
}

Forced forced_path() {
  const char* value = std::getenv("PIXELFLY_KERNEL");
  if (value == nullptr || *value == '\0' || std::strcmp(value, "auto") == 0) return Forced::kAuto;
  if (std::strcmp(value, "sm80") == 0) return Forced::kSm80;
  if (std::strcmp(value, "few") == 0) return Forced::kFew;
  if (std::strcmp(value, "sm90") == 0) return Forced::kHopper;
  return Forced::kUnknown;
}

Choice choose_product(const ProductParams& p, const DeviceInfo& device, Forced forced) {
  const bool hopper = product_sm90_supports(p, device);
  switch (forced) {
    case Forced::kSm80: return {};
    case Forced::kFew:
      if (product_few_sm80_supports(p)) return {Path::kFew, Status::success()};
      if (p.transposed) break;  // a backward of more tokens runs as it would
      return {Path::kFew,
              Status::unsupported("PIXELFLY_KERNEL=few cannot serve this product: it needs at most "
                                  "256 tokens, a 16-bit dtype, 16-byte aligned rows and "
                                  "blocks of 32 or more")};
    case Forced::kHopper:
      return {Path::kHopper, hopper ? Status::success() : cannot("sm90", "product")};
    case Forced::kUnknown:
      return {Path::kSm80, Status::invalid("PIXELFLY_KERNEL must be auto, sm80, few or sm90")};
    default: break;
  }
  // Weight tiles of blocks of 32 come in four boxes each: product_sm90 then takes longer.
  const int64_t always = hopper && p.header->block_size >= kGroupTile ? kFewTokens / 2 : kFewTokens;
  if (product_few_sm80_supports(p) &&
      few_tokens_are_quick(p.tokens, p.out_features, device, always)) {
    return {Path::kFew, Status::success()};
  }
  return {hopper ? Path::kHopper : Path::kSm80, Status::success()};
}

Choice choose_weight_grad(const WeightGradParams& p, const DeviceInfo& device, Forced forced) {
  const bool hopper = weight_grad_sm90_supports(p, device);
  switch (forced) {
    case Forced::kSm80:
    case Forced::kFew: return {};
    case Forced::kHopper:
      return {Path::kHopper, hopper ? Status::success() : cannot("sm90", "weight gradient")};
    case Forced::kUnknown:
      return {Path::kSm80, Status::invalid("PIXELFLY_KERNEL must be auto, sm80, few or sm90")};
    default: break;
  }
  return {hopper ? Path::kHopper : Path::kSm80, Status::success()};
}

Status refuse_thirds() {
  return Status::unsupported(
      "a gradient in thirds needs the kernels for Hopper, 16-byte aligned rows and thirds of a "
      "multiple of 64 features");
}

bool takes_thirds(DType dtype, int64_t tokens, const PlanHeader& h, const DeviceInfo& device) {
  if (h.out_features % (3 * kGroupTile) != 0) return false;
  ProductParams p{};
  p.dtype = dtype;
  p.transposed = true;
  p.tokens = tokens;
  p.in_features = h.out_features;
  p.out_features = h.in_features;
  p.header = &h;
  WeightGradParams g{};
  g.dtype = dtype;
  g.tokens = tokens;
  g.header = &h;
  const Forced forced = forced_path();
  const Choice dx = choose_product(p, device, forced), dw = choose_weight_grad(g, device, forced);
  const bool hopper = dx.path == Path::kHopper && dw.path == Path::kHopper;
  return hopper && dx.status.ok() && dw.status.ok();
}

}  // namespace pixelfly
