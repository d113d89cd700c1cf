// launch_weight_grad: choose a kernel and start it.
#include <cuda_runtime_api.h>

#include "launch/cuda_status.h"
#include "launch/heuristics.h"
#include "launch/weight_grad_sm80.h"
#include "launch/weight_grad_sm90.h"

namespace pixelfly {
namespace {

Status zero_gradients(const WeightGradParams& p, Stream stream) {
  const PlanHeader& h = *p.header;
  const auto clear = [&](void* data, int64_t count) {
    if (data == nullptr || count == 0) return cudaSuccess;
    return cudaMemsetAsync(data, 0, static_cast<size_t>(count * size_of(p.grad_dtype)), stream);
  };
  PIXELFLY_CUDA(clear(p.dblocks, int64_t{h.nnz} * h.block_size * h.block_size));
  PIXELFLY_CUDA(clear(p.du, int64_t{p.out_features} * h.rank));
  PIXELFLY_CUDA(clear(p.dv, int64_t{p.in_features} * h.rank));
  PIXELFLY_CUDA(clear(p.dbias, p.out_features));
  return Status::success();
}

}  // namespace

size_t weight_grad_workspace(const WeightGradParams& p, const DeviceInfo& device) {
  if (p.tokens == 0) return 0;
  const Choice choice = choose_weight_grad(p, device, forced_path());
  if (!choice.status.ok()) return 0;  // the launch will say why
  return choice.path == Path::kHopper ? weight_grad_workspace_sm90(p, device)
                                      : weight_grad_workspace_sm80(p, device);
}

Status launch_weight_grad(const WeightGradParams& p, const DeviceInfo& device, Stream stream) {
  if (p.tokens == 0) return zero_gradients(p, stream);
  const Choice choice = choose_weight_grad(p, device, forced_path());
  if (!choice.status.ok()) return choice.status;
  if (p.dz_others.given() && choice.path != Path::kHopper) return refuse_thirds();
  return choice.path == Path::kHopper ? launch_weight_grad_sm90(p, device, stream)
                                      : launch_weight_grad_sm80(p, device, stream);
}

std::string explain_weight_grad(const WeightGradParams& p, const DeviceInfo& device) {
  const Choice choice = choose_weight_grad(p, device, forced_path());
  return choice.status.ok() ? std::string("weight_grad_") + name_of(choice.path)
                            : choice.status.message;
}

}  // namespace pixelfly
