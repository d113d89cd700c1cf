// launch_product and launch_low_rank: choose a kernel and start it.
#include "launch/heuristics.h"
#include "launch/low_rank_sm90.h"
#include "launch/product_all_rows_sm90.h"
#include "launch/product_few_sm80.h"
#include "launch/product_sm80.h"
#include "launch/product_sm90.h"
#include "launch/product_split_sm90.h"

namespace pixelfly {
namespace {

Path choose_low_rank(const LowRankParams& p, const DeviceInfo& device) {
  const Forced forced = forced_path();
  const bool hopper = low_rank_sm90_supports(p, device);
  if (forced == Forced::kSm80) return Path::kSm80;
  // Of a wide contraction Hopper's clusters take up to 3 us less (few_tokens_h200.json,
  // "thin_few_us").
  constexpr int kWide = 2048, kMostOfWide = 16;
  const bool few = hopper && p.features >= kWide ? p.tokens <= kMostOfWide
                                                 : few_tokens_are_quick(p.tokens, p.rank, device);
  if (forced != Forced::kHopper && forced != Forced::kSplit && low_rank_few_sm80_supports(p) &&
      (forced == Forced::kFew || few)) {
    return Path::kFew;
  }
  return hopper ? Path::kHopper : Path::kSm80;
}

// Whether the product's launcher had better form t beside the product.
bool forms_t_beside(const ProductParams& p, const Choice& choice, const DeviceInfo& device) {
  return choice.path == Path::kHopper && product_sm90_forms_t(p, device) &&
         choose_low_rank(low_rank_of(p), device) == Path::kHopper;
}

std::string clusters(int of) { return of > 1 ? ", clusters of " + std::to_string(of) : ""; }

}  // namespace

Status launch_low_rank(const LowRankParams& p, const DeviceInfo& device, Stream stream) {
  if (p.tokens == 0 || p.rank == 0) return Status::success();
  const Path path = choose_low_rank(p, device);
  if (p.x_others.given() && path != Path::kHopper) return refuse_thirds();
  switch (path) {
    case Path::kHopper: return launch_low_rank_sm90(p, device, stream);
    case Path::kFew: return launch_low_rank_few_sm80(p, device, stream);
    default: return launch_low_rank_sm80(p, device, stream);
  }
}

size_t product_workspace(const ProductParams& p, const DeviceInfo& device) {
  const Choice choice = choose_product(p, device, forced_path());
  return forms_t_beside(p, choice, device) ? product_workspace_sm90(p) : 0;
}

Status launch_product(const ProductParams& p, const DeviceInfo& device, Stream stream) {
  if (p.tokens == 0) return Status::success();
  const Choice choice = choose_product(p, device, forced_path());
  if (!choice.status.ok()) return choice.status;
  if (p.x_others.given() && !takes_thirds(choice.path)) return refuse_thirds();

  // The kernels read t: form it first if it was not given, unless they do.
  ProductParams given = p;
  const bool forms_t = choice.path == Path::kAllRows || forms_t_beside(p, choice, device);
  if (p.factor_in != nullptr && !forms_t) {
    Status status = launch_low_rank(low_rank_of(p), device, stream);
    if (!status.ok()) return status;
    given.factor_in = nullptr;
  }
  switch (choice.path) {
    case Path::kHopper: return launch_product_sm90(given, device, stream);
    case Path::kFew: return launch_product_few_sm80(given, device, stream);
    case Path::kAllRows: return launch_product_all_rows_sm90(given, device, stream);
    case Path::kSplit:
      return launch_product_split_sm90(given, split_tile(p, device), device, stream);
    default: return launch_product_sm80(given, device, stream);
  }
}

Status launch_column_product(const ProductParams& p, const DeviceInfo& device, Stream stream) {
  if (p.tokens == 0) return Status::success();
  if (!product_sm90_supports(p, device)) {
    return Status::unsupported(
        "needs a Hopper GPU, bfloat16 or float16 aligned to 16 bytes, a number of columns that is "
        "a multiple of 16, no low rank and blocks of 64 or 128");
  }
  return launch_product_sm90(p, device, stream);
}

std::string explain_product(const ProductParams& p, const DeviceInfo& device) {
  const Choice choice = choose_product(p, device, forced_path());
  if (!choice.status.ok()) return choice.status.message;
  const std::string name = std::string("product_") + name_of(choice.path);
  if (choice.path != Path::kSplit) return name;
  const SplitTile tile = split_tile(p, device);
  return name + clusters(tile.cluster) + (tile.long_only ? " for long rows" : "");
}

std::string explain_low_rank(const ProductParams& p, const DeviceInfo& device) {
  const Choice choice = choose_product(p, device, forced_path());
  if (!choice.status.ok()) return choice.status.message;
  if (choice.path == Path::kAllRows) return "product_all_rows_sm90, in the product";
  if (forms_t_beside(p, choice, device)) return "low_rank_ahead_sm90, beside the product";
  const Path path = choose_low_rank(low_rank_of(p), device);
  if (path != Path::kHopper) return std::string("product_") + name_of(path) + " without blocks";
  return "low_rank_sm90" + clusters(low_rank_cluster(low_rank_of(p), device));
}

}  // namespace pixelfly
