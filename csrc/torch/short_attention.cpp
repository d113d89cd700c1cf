// pixelfly::short_attention and its backward on CUDA.
#include <tuple>

#include "torch/checks.h"
#include "torch/stream.h"

namespace pixelfly {
namespace {

constexpr const char* kOp = "pixelfly::short_attention";
constexpr const char* kBackwardOp = "pixelfly::short_attention_backward";

// A kernel's parameters without its pointers, after checks of qkv.
template <class Params>
Params sizes_of(const char* op, const Tensor& qkv, int64_t heads, double scale) {
  STD_TORCH_CHECK(qkv.dim() == 3, op, ": qkv must be [B, T, 3 * heads * ", kShortAttentionFeatures,
                  "], got ", shape_string(qkv));
  STD_TORCH_CHECK(heads >= 1 && heads <= INT32_MAX, op, ": heads must be between 1 and ", INT32_MAX,
                  ", got ", heads);
  const int64_t samples = qkv.size(0), tokens = qkv.size(1);
  check_rows(op, "qkv", qkv, qkv, {samples, tokens, 3 * heads * kShortAttentionFeatures});
  STD_TORCH_CHECK(qkv.is_contiguous(), op, ": qkv must be contiguous");
  STD_TORCH_CHECK(samples <= INT32_MAX && tokens <= INT32_MAX, op, ": qkv is too large, got ",
                  shape_string(qkv));
  Params p{};
  p.dtype = dtype_of(qkv, op);
  p.samples = static_cast<int32_t>(samples);
  p.tokens = static_cast<int32_t>(tokens);
  p.heads = static_cast<int32_t>(heads);
  p.scale = static_cast<float>(scale);
  return p;
}

template <class Params>
void check_served(const char* op, const Params& p, const DeviceInfo& device) {
  STD_TORCH_CHECK(
      short_attention_supports(p.dtype, p.tokens, kShortAttentionFeatures, device), op,
      ": has kernels for Hopper GPUs (if this build does), bfloat16 or float16 and at most ",
      kShortAttentionTokens, " tokens; got compute capability ", device.arch / 10, ".",
      device.arch % 10, ", ",
      p.dtype == DType::kFloat32    ? "float32"
      : p.dtype == DType::kBFloat16 ? "bfloat16"
                                    : "float16",
      " and ", p.tokens, " tokens");
}

// Checks a tensor [B, T, heads * 64] beside qkv.
void check_heads(const char* op, const char* name, const Tensor& t, const Tensor& qkv) {
  check_operand(op, name, t, qkv, {qkv.size(0), qkv.size(1), qkv.size(2) / 3});
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
}

std::tuple<Tensor, Tensor> short_attention(Tensor qkv, int64_t heads, double scale) {
  auto p = sizes_of<ShortAttentionParams>(kOp, qkv, heads, scale);

  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  Tensor y = empty(qkv, {p.samples, p.tokens, heads * kShortAttentionFeatures});
  Tensor log_sum = empty(qkv, {p.samples, heads, p.tokens}, aoti_torch_dtype_float32());
  if (qkv.numel() == 0) return {y, log_sum};
  const DeviceInfo device = device_of(qkv, kOp);
  check_served(kOp, p, device);
  qkv = aligned(qkv);
  p.qkv = qkv.data_ptr();
  p.y = y.data_ptr();
  p.log_sum = static_cast<float*>(log_sum.data_ptr());
  raise_if_error(launch_short_attention(p, device, current_stream(qkv.get_device_index())), kOp);
  return {y, log_sum};
}

Tensor short_attention_backward(Tensor dy, Tensor qkv, Tensor y, Tensor log_sum, int64_t heads,
                                double scale) {
  const char* op = kBackwardOp;
  auto p = sizes_of<ShortAttentionGradParams>(op, qkv, heads, scale);
  if (qkv.numel() == 0) return empty_beside(qkv, p.dtype);
  check_heads(op, "dy", dy, qkv);
  check_heads(op, "y", y, qkv);
  check_rows(op, "log_sum", log_sum, qkv, {p.samples, heads, p.tokens});
  STD_TORCH_CHECK(dtype_of(log_sum, op) == DType::kFloat32 && log_sum.is_contiguous(), op,
                  ": log_sum must be contiguous float32");

  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  Tensor dqkv = empty_beside(qkv, p.dtype);
  const DeviceInfo device = device_of(qkv, op);
  check_served(op, p, device);
  dy = aligned(dy);
  qkv = aligned(qkv);
  y = aligned(y);
  log_sum = aligned(log_sum);
  p.qkv = qkv.data_ptr();
  p.y = y.data_ptr();
  p.log_sum = static_cast<const float*>(log_sum.data_ptr());
  p.dy = dy.data_ptr();
  p.dqkv = dqkv.data_ptr();
  raise_if_error(launch_short_attention_grad(p, device, current_stream(qkv.get_device_index())),
                 op);
  return dqkv;
}

}  // namespace
}  // namespace pixelfly

STABLE_TORCH_LIBRARY_IMPL(pixelfly, CUDA, m) {
  m.impl("short_attention", TORCH_BOX(&pixelfly::short_attention));
  m.impl("short_attention_backward", TORCH_BOX(&pixelfly::short_attention_backward));
}
