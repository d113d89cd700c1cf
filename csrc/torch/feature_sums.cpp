// pixelfly::feature_sums on CUDA: gradients of biases where tokens are columns.
#include <vector>

#include "torch/checks.h"
#include "torch/stream.h"

namespace pixelfly {
namespace {

constexpr const char* kOp = "pixelfly::feature_sums";

std::vector<Tensor> feature_sums(std::vector<Tensor> tensors) {
  std::vector<Tensor> results;
  STD_TORCH_CHECK(!tensors.empty() && tensors.size() <= kMaxFeatureSums, kOp, ": takes 1 to ",
                  kMaxFeatureSums, " tensors, got ", tensors.size());
  FeatureSumsParams p{};
  p.dtype = dtype_of(tensors[0], kOp);
  const int32_t index = tensors[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const DeviceInfo device = device_of(tensors[0], kOp);
  for (Tensor& x : tensors) {
    STD_TORCH_CHECK(x.dim() == 3 && x.size(1) <= INT32_MAX, kOp,
                    ": tensors must be [S, features, C], got ", shape_string(x));
    check_operand(kOp, "a tensor", x, tensors[0], {x.size(0), x.size(1), x.size(2)});
    STD_TORCH_CHECK(x.is_contiguous(), kOp, ": tensors must be contiguous");
    x = aligned(x);
    results.push_back(empty(x, {x.size(1)}, aoti_torch_dtype_float32()));
    p.sums[p.count++] = {x.data_ptr(), static_cast<float*>(results.back().data_ptr()), x.size(0),
                         x.size(2), static_cast<int32_t>(x.size(1))};
  }
  raise_if_error(launch_feature_sums(p, device, current_stream(index)), kOp);
  return results;
}

}  // namespace
}  // namespace pixelfly

STABLE_TORCH_LIBRARY_IMPL(pixelfly, CUDA, m) {
  m.impl("feature_sums", TORCH_BOX(&pixelfly::feature_sums));
}
