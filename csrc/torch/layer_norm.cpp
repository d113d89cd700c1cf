// pixelfly::add_layer_norm and its backward on CUDA.
#include <tuple>

#include "torch/checks.h"
#include "torch/stream.h"

namespace pixelfly {
namespace {

constexpr const char* kOp = "pixelfly::add_layer_norm";
constexpr const char* kBackwardOp = "pixelfly::add_layer_norm_backward";

// Checks that t lies as other does: same device, same shape, contiguous.
void check_like(const char* op, const char* name, const Tensor& t, const Tensor& other) {
  const int32_t device = other.get_device_index();
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device, op, ": ", name,
                  " must be on the other operands' device (cuda:", device, ")");
  const auto sizes = t.sizes(), others = other.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), others.begin(), others.end()), op, ": ",
                  name, " must have shape ", shape_string(other), ", got ", shape_string(t));
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
}

struct Rows {
  int64_t tokens;
  int32_t features;
};
Rows rows_of(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() >= 1, op, ": ", name, " must be [..., features], got a 0-d tensor");
  const int64_t features = t.size(t.dim() - 1);
  STD_TORCH_CHECK(features > 0 && features <= INT32_MAX, op, ": ", name,
                  " must have features, got ", shape_string(t));
  return {t.numel() / features, static_cast<int32_t>(features)};
}

std::tuple<Tensor, OptionalTensor, Tensor, Tensor> forward(Tensor x, OptionalTensor delta,
                                                           Tensor weight, Tensor bias, double eps,
                                                           ScalarType y_dtype) {
  AddLayerNormParams p{};
  const auto [tokens, features] = rows_of(kOp, "x", x);
  p.dtype = p.delta_dtype = dtype_of(x, kOp);
  p.y_dtype = kernel_dtype(y_dtype, kOp, "y_dtype");
  p.weight_dtype = dtype_of(weight, kOp);
  p.tokens = tokens;
  p.features = features;
  p.eps = static_cast<float>(eps);
  check_like(kOp, "x", x, x);
  check_rows(kOp, "weight", weight, x, {features});
  check_operand(kOp, "bias", bias, weight, {features});
  if (delta) {
    check_like(kOp, "delta", *delta, x);
    p.delta_dtype = dtype_of(*delta, kOp);
  }

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const DeviceInfo device = device_of(x, kOp);
  x = aligned(x);
  delta = aligned(delta);
  weight = aligned(weight);
  bias = aligned(bias);
  Tensor y = empty_beside(x, p.y_dtype);
  OptionalTensor h;
  if (delta) h = empty_beside(x, p.dtype);
  Tensor mean = empty(x, {tokens}, aoti_torch_dtype_float32());
  Tensor rstd = empty(x, {tokens}, aoti_torch_dtype_float32());
  p.x = x.data_ptr();
  if (delta) {
    p.delta = delta->data_ptr();
    p.h = h->data_ptr();
  }
  p.weight = weight.data_ptr();
  p.bias = bias.data_ptr();
  p.y = y.data_ptr();
  p.mean = static_cast<float*>(mean.data_ptr());
  p.rstd = static_cast<float*>(rstd.data_ptr());
  raise_if_error(launch_add_layer_norm(p, device, current_stream(x.get_device_index())), kOp);
  return {y, h, mean, rstd};
}

std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor> backward(
    Tensor dy, OptionalTensor dh, Tensor h, Tensor weight, const Tensor& mean, const Tensor& rstd,
    std::optional<ScalarType> ddelta_dtype, bool need_weights) {
  const char* op = kBackwardOp;
  AddLayerNormGradParams p{};
  const auto [tokens, features] = rows_of(op, "h", h);
  p.dtype = p.delta_dtype = dtype_of(h, op);
  p.y_dtype = dtype_of(dy, op);
  p.weight_dtype = dtype_of(weight, op);
  p.tokens = tokens;
  p.features = features;
  check_like(op, "h", h, h);
  check_like(op, "dy", dy, h);
  check_rows(op, "weight", weight, h, {features});
  for (const auto& [name, t] : {std::pair("mean", &mean), std::pair("rstd", &rstd)}) {
    check_rows(op, name, *t, h, {tokens});
    STD_TORCH_CHECK(dtype_of(*t, op) == DType::kFloat32, op, ": ", name, " must be float32");
  }
  if (dh) {
    check_like(op, "dh", *dh, h);
    STD_TORCH_CHECK(dtype_of(*dh, op) == p.dtype, op, ": dh must have h's dtype");
  }
  if (ddelta_dtype) {
    p.delta_dtype = kernel_dtype(*ddelta_dtype, op, "ddelta_dtype");
    STD_TORCH_CHECK(p.delta_dtype != p.dtype, op,
                    ": ddelta_dtype must not be h's dtype: ddelta would be dx");
  }

  const torch::stable::accelerator::DeviceGuard guard(h.get_device_index());
  const DeviceInfo device = device_of(h, op);
  dy = aligned(dy);
  dh = aligned(dh);
  h = aligned(h);
  weight = aligned(weight);
  Tensor dx = empty_beside(h, p.dtype);
  OptionalTensor ddelta, dweight, dbias, workspace;
  if (ddelta_dtype) ddelta = empty_beside(h, p.delta_dtype);
  if (need_weights) {
    dweight = empty(weight, {features});
    dbias = empty(weight, {features});
    p.dweight = dweight->data_ptr();
    p.dbias = dbias->data_ptr();
    const auto bytes = static_cast<int64_t>(add_layer_norm_grad_workspace(p, device));
    workspace = empty(h, {bytes}, aoti_torch_dtype_uint8());
    p.workspace = workspace->data_ptr();
  }
  p.dy = dy.data_ptr();
  p.dh = dh ? dh->data_ptr() : nullptr;
  p.h = h.data_ptr();
  p.weight = weight.data_ptr();
  p.mean = static_cast<const float*>(mean.data_ptr());
  p.rstd = static_cast<const float*>(rstd.data_ptr());
  p.dx = dx.data_ptr();
  p.ddelta = ddelta ? ddelta->data_ptr() : nullptr;
  raise_if_error(launch_add_layer_norm_grad(p, device, current_stream(h.get_device_index())), op);
  return {dx, ddelta, dweight, dbias};
}

}  // namespace
}  // namespace pixelfly

STABLE_TORCH_LIBRARY_IMPL(pixelfly, CUDA, m) {
  m.impl("add_layer_norm", TORCH_BOX(&pixelfly::forward));
  m.impl("add_layer_norm_backward", TORCH_BOX(&pixelfly::backward));
}
