#include "kernels/product_sm80.cuh"
#include "launch/alignment.h"
#include "launch/product_sm80.h"

namespace pixelfly {
namespace sm80 {

Status launch_product_bf16(const ProductArgs& args, Stream stream);
Status launch_product_fp16(const ProductArgs& args, Stream stream);
Status launch_product_fp32(const ProductArgs& args, Stream stream);

namespace {

Status launch(const ProductArgs& args, Stream stream) {
  switch (args.p.dtype) {
    case DType::kBFloat16: return launch_product_bf16(args, stream);
    case DType::kFloat16: return launch_product_fp16(args, stream);
    default: return launch_product_fp32(args, stream);
  }
}

void set_vectors(ProductArgs* args) {
  const ProductParams& p = args->p;
  const int vec = static_cast<int>(16 / size_of(p.dtype));
  auto rows_of = [&](DType dtype, const void* data, int64_t stride, int64_t cols) {
    return data == nullptr || (aligned_rows(data, stride, dtype) && cols % vec == 0);
  };
  auto rows = [&](const void* data, int64_t stride, int64_t cols) {
    return rows_of(p.dtype, data, stride, cols);
  };
  const DType slopes = slope_dtype(p.dtype);
  args->x_vectors = rows(p.x, p.x_stride, p.in_features);
  args->blocks_vectors = rows(p.blocks, 0, 0);
  args->t_vectors = rows(p.t, p.t_stride, args->rank);
  args->factor_vectors =
      rows(p.factor, p.factor_stride, p.transposed ? p.out_features : args->rank);
  args->y_vectors = rows(p.y, p.y_stride, p.out_features) &&
                    rows_of(slopes, p.slope_out, p.slope_out_stride, p.out_features);
  args->epilogue_vectors = rows_of(slopes, p.slope, p.slope_stride, p.out_features) &&
                           rows(p.residual, p.residual_stride, p.out_features);
}

}  // namespace
}  // namespace sm80

Status launch_product_sm80(const ProductParams& p, const DeviceInfo&, Stream stream) {
  const PlanHeader& h = *p.header;
  sm80::ProductArgs args{};
  args.p = p;
  args.p.header = nullptr;
  args.block_size = h.block_size;
  args.rank = h.rank;
  args.row_ptr = p.plan + (p.transposed ? h.col_ptr_offset : h.row_ptr_offset);
  args.col_idx = p.plan + (p.transposed ? h.t_row_offset : h.col_idx_offset);
  args.block = p.transposed ? p.plan + h.t_block_offset : nullptr;
  args.out_tiles = p.transposed ? h.num_cols : h.num_rows;
  sm80::set_vectors(&args);
  return sm80::launch(args, stream);
}

// t = x · vᵀ is the low-rank term of a product without blocks whose "t" is x and whose "u" is v.
Status launch_low_rank_sm80(const LowRankParams& p, const DeviceInfo&, Stream stream) {
  constexpr int kThin = 64;  // output features per thread block
  sm80::ProductArgs args{};
  ProductParams& q = args.p;
  q.dtype = p.dtype;
  q.allow_tf32 = p.allow_tf32;
  q.transposed = p.transposed;
  q.tokens = p.tokens;
  q.out_features = p.rank;
  q.t = const_cast<void*>(p.x);  // read only: factor_in is null
  q.t_stride = p.x_stride;
  q.factor = p.factor;
  q.factor_stride = p.factor_stride;
  q.y = p.t;
  q.y_stride = p.t_stride;
  args.block_size = kThin;
  args.rank = p.features;
  args.out_tiles = (p.rank + kThin - 1) / kThin;
  sm80::set_vectors(&args);
  return sm80::launch(args, stream);
}

}  // namespace pixelfly
