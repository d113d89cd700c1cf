// What stands in for the Hopper launchers in a build whose TORCH_CUDA_ARCH_LIST leaves 9.0 out:
// they serve no call, so that every call goes to the kernels for sm_80 and newer.
#include "launch/low_rank_sm90.h"
#include "launch/product_all_rows_sm90.h"
#include "launch/product_sm90.h"
#include "launch/product_split_sm90.h"
#include "launch/weight_grad_sm90.h"
#include "pixelfly/launch.h"

namespace pixelfly {
namespace {

Status not_built() {
  return Status::unsupported(
      "this build has no Hopper kernels: TORCH_CUDA_ARCH_LIST left out 9.0a");
}

}  // namespace

bool low_rank_sm90_supports(const LowRankParams&, const DeviceInfo&) { return false; }
bool product_sm90_supports(const ProductParams&, const DeviceInfo&) { return false; }
bool product_all_rows_sm90_supports(const ProductParams&, const DeviceInfo&) { return false; }
bool product_split_sm90_supports(const ProductParams&, const DeviceInfo&) { return false; }
bool weight_grad_sm90_supports(const WeightGradParams&, const DeviceInfo&) { return false; }
bool short_attention_supports(DType, int64_t, int64_t, const DeviceInfo&) { return false; }

int low_rank_cluster(const LowRankParams&, const DeviceInfo&) { return 1; }
Status launch_low_rank_sm90(const LowRankParams&, const DeviceInfo&, Stream) { return not_built(); }
Status launch_low_rank_ahead_sm90(const LowRankParams&, const DeviceInfo&, int, int32_t*, Stream) {
  return not_built();
}
Status launch_product_sm90(const ProductParams&, const DeviceInfo&, Stream) { return not_built(); }
Status launch_product_split_sm90(const ProductParams&, const SplitTile&, const DeviceInfo&,
                                 Stream) {
  return not_built();
}
Status launch_product_all_rows_sm90(const ProductParams&, const DeviceInfo&, Stream) {
  return not_built();
}
Status launch_weight_grad_sm90(const WeightGradParams&, const DeviceInfo&, Stream) {
  return not_built();
}

Status launch_short_attention(const ShortAttentionParams&, const DeviceInfo&, Stream) {
  return not_built();
}
Status launch_short_attention_grad(const ShortAttentionGradParams&, const DeviceInfo&, Stream) {
  return not_built();
}

bool product_sm90_forms_t(const ProductParams&, const DeviceInfo&) { return false; }
size_t product_workspace_sm90(const ProductParams&) { return 0; }
size_t weight_grad_workspace_sm90(const WeightGradParams&, const DeviceInfo&) { return 0; }

}  // namespace pixelfly
