// pixelfly::column_product on CUDA (Hopper): products by blocks where tokens are columns.
#include <tuple>

#include "torch/checks.h"
#include "torch/stream.h"

namespace pixelfly {
namespace {

constexpr const char* kOp = "pixelfly::column_product";

std::tuple<Tensor, OptionalTensor> column_product(Tensor x, Tensor blocks, OptionalTensor bias,
                                                  OptionalTensor slope, const Tensor& plan,
                                                  const std::string& header_text,
                                                  int64_t out_features, int64_t activation,
                                                  bool save_slope, bool transposed) {
  const PlanHeader& h = parse_header(header_text, plan, kOp);
  const DType dtype = dtype_of(x, kOp);
  STD_TORCH_CHECK(x.dim() == 3, kOp, ": x must be [S, in_features, C], got ", shape_string(x));
  const int64_t samples = x.size(0), in = x.size(1), columns = x.size(2), b = h.block_size;
  const int64_t most_in = transposed ? h.out_features : h.in_features;
  const int64_t most_out = transposed ? h.in_features : h.out_features;
  const auto fits = [b](int64_t size, int64_t most) { return size <= most && size > most - b; };
  STD_TORCH_CHECK(fits(in, most_in) && fits(out_features, most_out), kOp, ": the plan is for ",
                  most_in, " to ", most_out, " features, got ", in, " to ", out_features);
  STD_TORCH_CHECK(columns > 0 && columns <= INT32_MAX, kOp, ": x must have columns, got ",
                  shape_string(x));
  check_operand(kOp, "x", x, x, {samples, in, columns});
  check_operand(kOp, "blocks", blocks, x, {h.nnz, b, b});
  if (bias) check_operand(kOp, "bias", *bias, x, {out_features});
  const DType slopes = slope_dtype(dtype);
  const int32_t slope_number = slopes == DType::kUInt8 ? aoti_torch_dtype_uint8() : dtype_number(x);
  if (slope) {
    check_rows(kOp, "slope", *slope, x, {samples, out_features, columns});
    STD_TORCH_CHECK(dtype_number(*slope) == slope_number && slope->is_contiguous(), kOp,
                    ": slope must be as this operator saved it");
  }
  STD_TORCH_CHECK(x.is_contiguous() && blocks.is_contiguous(), kOp,
                  ": x and blocks must be contiguous");

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const DeviceInfo device = device_of(x, kOp);
  blocks = aligned(blocks);
  bias = aligned(bias);
  Tensor y = empty(x, {samples, out_features, columns});
  OptionalTensor saved;
  if (save_slope) saved = empty(x, {samples, out_features, columns}, slope_number);
  if (samples == 0) return {y, saved};

  const auto pointer = [](const OptionalTensor& t) { return t ? t->data_ptr() : nullptr; };
  ProductParams p{};
  p.dtype = dtype;
  p.transposed = transposed;
  p.tokens = samples * columns;
  p.columns = static_cast<int32_t>(columns);
  p.in_features = static_cast<int32_t>(in);
  p.out_features = static_cast<int32_t>(out_features);
  p.x = x.data_ptr();
  p.blocks = blocks.data_ptr();
  p.bias = pointer(bias);
  p.slope = pointer(slope);
  p.activation = static_cast<Activation>(activation);
  p.y = y.data_ptr();
  p.slope_out = pointer(saved);
  p.header = &h;
  p.plan = static_cast<const int32_t*>(plan.data_ptr());
  raise_if_error(launch_column_product(p, device, current_stream(x.get_device_index())), kOp);
  return {y, saved};
}

}  // namespace
}  // namespace pixelfly

STABLE_TORCH_LIBRARY_IMPL(pixelfly, CUDA, m) {
  m.impl("column_product", TORCH_BOX(&pixelfly::column_product));
}
