// Which kernel serves a call. Pure host code: testable without a GPU.
#pragma once

#include <string>

#include "pixelfly/launch.h"

namespace pixelfly {

enum class Path {
  kSm80,    // product_sm80, weight_grad_sm80: mma.sync, serves everything
  kFew,     // product_few_sm80: few tokens
  kHopper,  // product_sm90, weight_grad_sm90: wgmma + TMA
};
const char* name_of(Path path);

// What PIXELFLY_KERNEL asks for: "auto" (or unset), "sm80", "few" or "sm90".
enum class Forced { kAuto, kSm80, kFew, kHopper, kUnknown };
Forced forced_path();

struct Choice {
  Path path = Path::kSm80;
  Status status = Status::success();  // not ok: the forced path cannot serve the call
};
Choice choose_product(const ProductParams& p, const DeviceInfo& device, Forced forced);
Choice choose_weight_grad(const WeightGradParams& p, const DeviceInfo& device, Forced forced);

// What a path that takes no thirds says to them.
Status refuse_thirds();

}  // namespace pixelfly
