// pixelfly::softmax_minus_target_ on CUDA.
#include "torch/checks.h"
#include "torch/stream.h"

namespace pixelfly {
namespace {

constexpr const char* kOp = "pixelfly::softmax_minus_target_";

Tensor softmax_minus_target(Tensor logits, const Tensor& target, int64_t classes,
                            int64_t ignore_index, bool write) {
  STD_TORCH_CHECK(logits.dim() == 2, kOp, ": logits must be [T, columns], got ",
                  shape_string(logits));
  const int64_t tokens = logits.size(0), columns = logits.size(1);
  check_rows(kOp, "logits", logits, logits, {tokens, columns});
  check_rows(kOp, "target", target, logits, {tokens});
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long && target.is_contiguous(), kOp,
                  ": target must be contiguous int64");
  STD_TORCH_CHECK(classes >= 1 && classes <= columns && columns <= INT32_MAX, kOp,
                  ": classes must be between 1 and ", columns, ", got ", classes);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(logits.data_ptr()) % 16 == 0, kOp,
                  ": logits must be aligned to 16 bytes");

  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const DeviceInfo device = device_of(logits, kOp);
  Tensor loss = empty(logits, {tokens}, aoti_torch_dtype_float32());
  SoftmaxMinusTargetParams p{};
  p.dtype = dtype_of(logits, kOp);
  p.tokens = tokens;
  p.columns = static_cast<int32_t>(columns);
  p.classes = static_cast<int32_t>(classes);
  p.ignore_index = ignore_index;
  p.write = write;
  p.logits = logits.data_ptr();
  p.stride = logits.stride(0);
  p.target = static_cast<const int64_t*>(target.data_ptr());
  p.loss = static_cast<float*>(loss.data_ptr());
  raise_if_error(launch_softmax_minus_target(p, device, current_stream(logits.get_device_index())),
                 kOp);
  return loss;
}

}  // namespace
}  // namespace pixelfly

STABLE_TORCH_LIBRARY_IMPL(pixelfly, CUDA, m) {
  m.impl("softmax_minus_target_", TORCH_BOX(&pixelfly::softmax_minus_target));
}
