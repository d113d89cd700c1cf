// Which kernel serves a call. Pure host code: testable without a GPU.
#pragma once

#include <string>

#include "pixelfly/launch.h"

namespace pixelfly {

enum class Path {
  kSm80,     // product_sm80, weight_grad_sm80: mma.sync, serves everything
  kFew,      // product_few_sm80: few tokens
  kSplit,    // product_split_sm90: few tokens, and wide contractions
  kAllRows,  // product_all_rows_sm90: few outputs, many tokens
  kHopper,   // product_sm90, weight_grad_sm90: wgmma + TMA
};
const char* name_of(Path path);
inline bool takes_thirds(Path product) {
  return product == Path::kHopper || product == Path::kSplit;
}

// What PIXELFLY_KERNEL asks for: "auto" (or unset), "sm80", "few", "split", "all_rows" or "sm90".
enum class Forced { kAuto, kSm80, kFew, kSplit, kAllRows, kHopper, kUnknown };
Forced forced_path();

struct Choice {
  Path path = Path::kSm80;
  Status status = Status::success();  // not ok: the forced path cannot serve the call
};
Choice choose_product(const ProductParams& p, const DeviceInfo& device, Forced forced);
Choice choose_weight_grad(const WeightGradParams& p, const DeviceInfo& device, Forced forced);

// What a thread block of product_split_sm90 makes, and how many of them share a contraction.
struct SplitTile {
  int warpgroups;  // 64 tokens each
  int cluster;
  bool long_only;  // long rows' contractions (LongRows); of another's a thread block makes all
};
// The quickest, by a model of its loads and of adding sums.
SplitTile split_tile(const ProductParams& p, const DeviceInfo& device);
// Whether that is quicker than product_few_sm80, if `few`, else than product_sm90.
bool split_is_quick(const ProductParams& p, bool few, const DeviceInfo& device);

// How product_all_rows_sm90 cuts the tokens: so many tiles of 128, and then so many of 64, dealt in
// turn to sets of thread blocks.
struct AllRowsTurns {
  int32_t sets;
  int32_t whole_tiles;
  int32_t half_tiles;
};
AllRowsTurns all_rows_turns(const ProductParams& p, const DeviceInfo& device);
// Whether product_all_rows_sm90 is expected to be quicker than product_sm90, with what forms t.
bool all_rows_are_quick(const ProductParams& p, const DeviceInfo& device);

// What a path that takes no thirds says to them.
Status refuse_thirds();

}  // namespace pixelfly
