// pixelfly::backward on CUDA: the gradients of pixelfly::forward that are asked for.
#include <tuple>

#include "torch/checks.h"
#include "torch/stream.h"

namespace pixelfly {
namespace {

constexpr const char* kOp = "pixelfly::backward";

// Matrices of one width side by side: [T, N].
Tensor joined(std::initializer_list<Tensor> thirds, int64_t tokens, int64_t n) {
  Tensor whole = empty(*thirds.begin(), {tokens, n});
  int64_t at = 0;
  for (const Tensor& third : thirds) {
    Tensor place = torch::stable::narrow(whole, 1, at, third.size(1));
    torch::stable::copy_(place, third);
    at += third.size(1);
  }
  return whole;
}

std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor> backward(
    Tensor dy, OptionalTensor x, Tensor blocks, OptionalTensor u, OptionalTensor v,
    OptionalTensor t, OptionalTensor slope, const Tensor& plan, const std::string& header_text,
    bool relu, bool allow_tf32, bool deterministic, bool need_dx, bool need_dblocks, bool need_du,
    bool need_dv, bool need_dbias, OptionalTensor x_slope, bool float32_grads, OptionalTensor dy_k,
    OptionalTensor dy_v) {
  const PlanHeader& h = parse_header(header_text, plan, kOp);
  const DType dtype = dtype_of(dy, kOp);
  STD_TORCH_CHECK(dy.dim() == 2, kOp, ": dy must be [T, out_features], got ", shape_string(dy));
  const int64_t tokens = dy.size(0), k = h.in_features, n = h.out_features, b = h.block_size;
  need_du = need_du && h.rank > 0;
  need_dv = need_dv && h.rank > 0;
  const bool need_weights = need_dblocks || need_dbias || need_du || need_dv;
  const bool thirds = dy_k.has_value();
  STD_TORCH_CHECK(thirds == dy_v.has_value() && (!thirds || n % 3 == 0), kOp,
                  ": dy_k and dy_v must be given together, for out_features that are a multiple of "
                  "3, got ",
                  n);
  check_operand(kOp, "dy", dy, dy, {tokens, thirds ? n / 3 : n});
  if (thirds) check_operand(kOp, "dy_k", *dy_k, dy, {tokens, n / 3});
  if (thirds) check_operand(kOp, "dy_v", *dy_v, dy, {tokens, n / 3});
  check_operand(kOp, "blocks", blocks, dy, {h.nnz, b, b});
  STD_TORCH_CHECK(blocks.is_contiguous(), kOp, ": blocks must be contiguous");
  STD_TORCH_CHECK(u.has_value() == (h.rank > 0) && v.has_value() == (h.rank > 0), kOp,
                  ": u and v must be given exactly if the plan has a rank (", h.rank, ")");
  STD_TORCH_CHECK(!need_weights || (x && t.has_value() == (h.rank > 0)), kOp,
                  ": gradients of weights need x and, with a rank, t");
  if (u) check_operand(kOp, "u", *u, dy, {n, h.rank});
  if (v) check_operand(kOp, "v", *v, dy, {h.rank, k});
  if (x) check_operand(kOp, "x", *x, dy, {tokens, k});
  if (t) check_operand(kOp, "t", *t, dy, {tokens, h.rank});
  DType given_slope = dtype;
  if (slope) given_slope = check_slope(kOp, "slope", *slope, dy, dtype, relu, {tokens, n});
  if (x_slope) check_slope(kOp, "x_slope", *x_slope, dy, dtype, false, {tokens, k});

  const torch::stable::accelerator::DeviceGuard guard(dy.get_device_index());
  const DeviceInfo device = device_of(dy, kOp);
  const Stream stream = current_stream(dy.get_device_index());
  if (thirds && (slope || x_slope || !takes_thirds(dtype, tokens, h, device))) {
    dy = joined({dy, *dy_k, *dy_v}, tokens, n);
    dy_k = dy_v = OptionalTensor();
  }
  dy = aligned(dy);
  dy_k = aligned(dy_k);
  dy_v = aligned(dy_v);
  x = aligned(x);
  blocks = aligned(blocks);
  u = aligned(u);
  v = aligned(v);
  x_slope = aligned(x_slope);
  OptionalTensor dx;
  if (need_dx) dx = empty(dy, {tokens, k});
  const int32_t grad_dtype = float32_grads ? aoti_torch_dtype_float32() : dtype_number(dy);
  auto gradient = [&](bool needed, std::initializer_list<int64_t> shape) {
    return needed ? OptionalTensor(empty(dy, shape, grad_dtype)) : OptionalTensor();
  };
  const OptionalTensor dblocks = gradient(need_dblocks, {h.nnz, b, b});
  const OptionalTensor du = gradient(need_du, {n, h.rank});
  const OptionalTensor dv = gradient(need_dv, {h.rank, k});
  const OptionalTensor dbias = gradient(need_dbias, {n});

  Tensor dz = dy;
  if (slope && tokens > 0) {
    dz = empty(dy, {tokens, n});
    ActivationGradParams a{};
    a.dtype = dtype;
    a.slope_dtype = given_slope;
    a.relu = relu;
    a.tokens = tokens;
    a.features = h.out_features;
    a.dy = dy.data_ptr();
    a.dy_stride = dy.stride(0);
    a.slope = slope->data_ptr();
    a.slope_stride = slope->stride(0);
    a.dz = dz.data_ptr();
    a.dz_stride = n;
    raise_if_error(launch_activation_grad(a, device, stream), kOp);
  }
  const Matrix dz_rows = matrix(dz), k_third = matrix(dy_k), v_third = matrix(dy_v);
  const OtherThirds others{{k_third.data, v_third.data}, {k_third.stride, v_third.stride}};
  const Matrix x_rows = matrix(x);
  const Matrix u_rows = matrix(u), v_rows = matrix(v);

  // s = dz · u: formed on the way to dx if dx is wanted, else alone for dv.
  const bool need_s = h.rank > 0 && (need_dx || need_dv) && tokens > 0;
  OptionalTensor s;
  if (need_s) s = padded_rows(dy, tokens, h.rank);
  const Matrix s_rows = matrix(s);
  ProductParams product{};
  product.dtype = dtype;
  product.allow_tf32 = allow_tf32;
  product.transposed = true;
  product.tokens = tokens;
  product.in_features = h.out_features;
  product.out_features = h.in_features;
  product.x = dz_rows.data;
  product.x_stride = dz_rows.stride;
  product.x_others = others;
  product.blocks = matrix(blocks).data;
  product.factor_in = u_rows.data;
  product.factor_in_stride = u_rows.stride;
  product.factor = v_rows.data;
  product.factor_stride = v_rows.stride;
  product.t = s_rows.data;
  product.t_stride = s_rows.stride;
  product.header = &h;
  product.plan = static_cast<const int32_t*>(plan.data_ptr());
  if (need_dx && tokens > 0) {
    product.y = dx->data_ptr();
    product.y_stride = k;
    const Matrix slope_rows = matrix(x_slope);
    product.slope = slope_rows.data;
    product.slope_stride = slope_rows.stride;
    const OptionalTensor workspace = empty_bytes(dy, product_workspace(product, device));
    product.workspace = matrix(workspace).data;
    raise_if_error(launch_product(product, device, stream), kOp);
  } else if (need_s) {
    raise_if_error(launch_low_rank(low_rank_of(product), device, stream), kOp);
  }

  if (need_weights) {
    const Matrix t_rows = matrix(t);
    WeightGradParams p{};
    p.dtype = dtype;
    p.grad_dtype = float32_grads ? DType::kFloat32 : dtype;
    p.allow_tf32 = allow_tf32;
    p.deterministic = deterministic;
    p.tokens = tokens;
    p.in_features = h.in_features;
    p.out_features = h.out_features;
    p.dz = dz_rows.data;
    p.dz_stride = dz_rows.stride;
    p.dz_others = others;
    p.x = x_rows.data;
    p.x_stride = x_rows.stride;
    p.t = t_rows.data;
    p.t_stride = t_rows.stride;
    p.s = s_rows.data;
    p.s_stride = s_rows.stride;
    p.dblocks = matrix(dblocks).data;
    p.du = matrix(du).data;
    p.dv = matrix(dv).data;
    p.dbias = matrix(dbias).data;
    p.header = &h;
    p.plan = static_cast<const int32_t*>(plan.data_ptr());
    const OptionalTensor workspace = empty_bytes(dy, weight_grad_workspace(p, device));
    p.workspace = matrix(workspace).data;
    raise_if_error(launch_weight_grad(p, device, stream), kOp);
  }
  return {dx, dblocks, du, dv, dbias};
}

}  // namespace
}  // namespace pixelfly

STABLE_TORCH_LIBRARY_IMPL(pixelfly, CUDA, m) { m.impl("backward", TORCH_BOX(&pixelfly::backward)); }
