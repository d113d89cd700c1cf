#include "launch/weight_grad_sm90.h"

namespace pixelfly {

bool weight_grad_sm90_supports(const WeightGradParams&, const DeviceInfo&) { return false; }
Status launch_weight_grad_sm90(const WeightGradParams&, const DeviceInfo&, Stream) {
  return Status::unsupported("weight_grad_sm90 is not built");
}
size_t weight_grad_workspace_sm90(const WeightGradParams&, const DeviceInfo&) { return 0; }

}  // namespace pixelfly
