#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "kernels/product_few_sm80.cuh"
#include "launch/alignment.h"
#include "launch/launch_kernel.h"
#include "launch/product_few_sm80.h"

namespace pixelfly {
namespace {

constexpr int64_t kMostTokens = 8 * sm80::kFewMaxTiles;

// `chunks`: the longest contraction of a thread block, in steps of kFewDepth. A warp takes at least
// two.
template <typename T, int kTiles>
Status launch_tiles(const sm80::FewArgs& args, int chunks, Stream stream) {
  const int warps = std::clamp(chunks / 2, 1, sm80::kFewMaxWarps);
  const int features = args.p.out_features;
  const auto grid = static_cast<unsigned>((features + sm80::kFewFeatures - 1) / sm80::kFewFeatures);
  const int shared_bytes = warps * kTiles * 8 * sm80::kFewStride * static_cast<int>(sizeof(float));
  return launch_dependent_if_it_waits(sm80::product_few_sm80<T, kTiles>, grid,
                                      static_cast<unsigned>(warps * 32), shared_bytes, stream,
                                      args);
}

template <typename T>
Status launch_dtype(const sm80::FewArgs& args, int chunks, Stream stream) {
  const int64_t tiles = (args.p.tokens + 7) / 8;
  if (tiles <= 1) return launch_tiles<T, 1>(args, chunks, stream);
  if (tiles <= 2) return launch_tiles<T, 2>(args, chunks, stream);
  if (tiles <= 4) return launch_tiles<T, 4>(args, chunks, stream);
  return launch_tiles<T, 8>(args, chunks, stream);
}

Status launch(sm80::FewArgs args, int chunks, Stream stream) {
  const ProductParams& p = args.p;
  args.quads_aligned = aligned_rows(p.y, p.y_stride, p.dtype) &&
                       aligned_rows(p.residual, p.residual_stride, p.dtype) &&
                       aligned_rows(p.slope_out, p.slope_out_stride, p.dtype);
  return args.p.dtype == DType::kBFloat16 ? launch_dtype<__nv_bfloat16>(args, chunks, stream)
                                          : launch_dtype<__half>(args, chunks, stream);
}

int rank_chunks(int rank) { return (rank + sm80::kFewDepth - 1) / sm80::kFewDepth; }

}  // namespace

bool product_few_sm80_supports(const ProductParams& p) {
  if (p.tokens > kMostTokens || p.transposed || p.dtype == DType::kFloat32) return false;
  const PlanHeader& h = *p.header;
  return h.block_size >= sm80::kFewDepth && h.rank % 8 == 0 && p.in_features % 8 == 0 &&
         aligned_rows(p.x, p.x_stride, p.dtype) && aligned_rows(p.blocks, 0, p.dtype) &&
         aligned_rows(p.t, p.t_stride, p.dtype) && aligned_rows(p.factor, p.factor_stride, p.dtype);
}

Status launch_product_few_sm80(const ProductParams& p, Stream stream) {
  const PlanHeader& h = *p.header;
  sm80::FewArgs args{};
  args.p = p;
  args.p.header = nullptr;
  args.row_ptr = p.plan + h.row_ptr_offset;
  args.col_idx = p.plan + h.col_idx_offset;
  args.block_size = h.block_size;
  args.rank = h.rank;
  const int chunks = h.max_row_blocks * (h.block_size / sm80::kFewDepth) + rank_chunks(h.rank);
  return launch(args, chunks, stream);
}

bool low_rank_few_sm80_supports(const LowRankParams& p) {
  return p.tokens <= kMostTokens && !p.transposed && p.dtype != DType::kFloat32 &&
         p.features % 8 == 0 && aligned_rows(p.x, p.x_stride, p.dtype) &&
         aligned_rows(p.factor, p.factor_stride, p.dtype);
}

// t = x · vᵀ is the low-rank term of a product without blocks whose "t" is x and whose "u" is v.
Status launch_low_rank_few_sm80(const LowRankParams& p, Stream stream) {
  sm80::FewArgs args{};
  ProductParams& q = args.p;
  q.dtype = p.dtype;
  q.tokens = p.tokens;
  q.out_features = p.rank;
  q.t = const_cast<void*>(p.x);  // read only
  q.t_stride = p.x_stride;
  q.factor = p.factor;
  q.factor_stride = p.factor_stride;
  q.y = p.t;
  q.y_stride = p.t_stride;
  args.block_size = sm80::kFewDepth;
  args.rank = p.features;
  return launch(args, rank_chunks(p.features), stream);
}

}  // namespace pixelfly
