// pixelfly::forward on CUDA: y = act(x Bᵀ + (x vᵀ) uᵀ + bias) + residual.
#include <tuple>

#include "torch/checks.h"
#include "torch/stream.h"

namespace pixelfly {
namespace {

constexpr const char* kOp = "pixelfly::forward";

std::tuple<Tensor, OptionalTensor, OptionalTensor> forward(
    Tensor x, Tensor blocks, OptionalTensor u, OptionalTensor v, OptionalTensor bias,
    OptionalTensor residual, const Tensor& plan, const std::string& header_text, int64_t activation,
    bool save_slope, bool allow_tf32) {
  const PlanHeader& h = parse_header(header_text, plan, kOp);
  const DType dtype = dtype_of(x, kOp);
  STD_TORCH_CHECK(x.dim() == 2, kOp, ": x must be [T, in_features], got ", shape_string(x));
  const int64_t tokens = x.size(0), k = h.in_features, n = h.out_features, b = h.block_size;
  check_operand(kOp, "x", x, x, {tokens, k});
  check_operand(kOp, "blocks", blocks, x, {h.nnz, b, b});
  STD_TORCH_CHECK(blocks.is_contiguous(), kOp, ": blocks must be contiguous");
  STD_TORCH_CHECK(u.has_value() == (h.rank > 0) && v.has_value() == (h.rank > 0), kOp,
                  ": u and v must be given exactly if the plan has a rank (", h.rank, ")");
  if (u) check_operand(kOp, "u", *u, x, {n, h.rank});
  if (v) check_operand(kOp, "v", *v, x, {h.rank, k});
  if (bias) check_operand(kOp, "bias", *bias, x, {n});
  if (residual) check_operand(kOp, "residual", *residual, x, {tokens, n});

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const DeviceInfo device = device_of(x, kOp);
  x = aligned(x);
  blocks = aligned(blocks);
  u = aligned(u);
  v = aligned(v);
  bias = aligned(bias);
  residual = aligned(residual);
  Tensor y = empty(x, {tokens, n});
  OptionalTensor t, slope;
  if (h.rank > 0) t = padded_rows(x, tokens, h.rank);
  if (save_slope) slope = empty_slope(x, dtype, tokens, n);

  ProductParams p{};
  p.dtype = dtype;
  p.allow_tf32 = allow_tf32;
  p.tokens = tokens;
  p.in_features = h.in_features;
  p.out_features = h.out_features;
  auto set = [](auto& pointer, int64_t& stride, const Matrix& m) {
    pointer = m.data;
    stride = m.stride;
  };
  int64_t unused = 0;
  set(p.x, p.x_stride, matrix(x));
  set(p.blocks, unused, matrix(blocks));
  set(p.factor_in, p.factor_in_stride, matrix(v));
  set(p.factor, p.factor_stride, matrix(u));
  set(p.t, p.t_stride, matrix(t));
  set(p.bias, unused, matrix(bias));
  set(p.residual, p.residual_stride, matrix(residual));
  set(p.y, p.y_stride, matrix(y));
  set(p.slope_out, p.slope_out_stride, matrix(slope));
  p.activation = static_cast<Activation>(activation);
  p.header = &h;
  p.plan = static_cast<const int32_t*>(plan.data_ptr());
  if (tokens > 0) {
    const OptionalTensor workspace = empty_bytes(x, product_workspace(p, device));
    p.workspace = matrix(workspace).data;
    raise_if_error(launch_product(p, device, current_stream(x.get_device_index())), kOp);
  }
  return {y, t, slope};
}

}  // namespace
}  // namespace pixelfly

STABLE_TORCH_LIBRARY_IMPL(pixelfly, CUDA, m) { m.impl("forward", TORCH_BOX(&pixelfly::forward)); }
