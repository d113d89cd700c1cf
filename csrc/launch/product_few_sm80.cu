#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "kernels/product_few_sm80.cuh"
#include "launch/alignment.h"
#include "launch/launch_kernel.h"
#include "launch/product_few_sm80.h"

namespace pixelfly {
namespace {

constexpr int64_t kMostTokens = 256;
constexpr int64_t kBlockTokens = 8 * sm80::kFewMaxTiles;

int64_t groups_of(int32_t outputs) {
  return (int64_t{outputs} + sm80::kFewFeatures - 1) / sm80::kFewFeatures;
}

// `chunks`: the longest contraction of a group, in steps of kFewDepth. A warp takes at least two.
template <typename T, int kTiles, bool kTransposed>
Status launch_tiles(const sm80::FewArgs& args, int chunks, const DeviceInfo& device,
                    Stream stream) {
  const auto groups = static_cast<int>(groups_of(args.p.out_features));
  // Two where thread blocks would share multiprocessors anyway; 16 tokens are too little x.
  const int together = kTiles > 2 && groups > device.num_sms ? 2 : 1;
  const int warps = std::clamp(chunks / 2, 1, sm80::kFewMaxWarps / together);
  const dim3 threads(static_cast<unsigned>(warps * 32), static_cast<unsigned>(together));
  const dim3 grid(static_cast<unsigned>((groups + together - 1) / together),
                  static_cast<unsigned>((args.p.tokens + kTiles * 8 - 1) / (kTiles * 8)));
  const int shared_bytes =
      together * sm80::few_shared_floats(warps, kTiles) * static_cast<int>(sizeof(float));
  return launch_dependent_if_it_waits(sm80::product_few_sm80<T, kTiles, kTransposed>, grid, threads,
                                      shared_bytes, stream, args);
}

template <typename T, bool kTransposed>
Status launch_dtype(const sm80::FewArgs& args, int chunks, const DeviceInfo& device,
                    Stream stream) {
  const int64_t all = (args.p.tokens + 7) / 8;
  int64_t tiles = std::min<int64_t>(all, sm80::kFewMaxTiles);
  // Where multiprocessors would be idle, thread blocks take 32 tokens instead of 64, and more of
  // them read the same weights; fewer than 32 gain nothing.
  if (tiles > 4 && groups_of(args.p.out_features) * ((all + 3) / 4) <= device.num_sms) tiles = 4;
  if (tiles <= 1) return launch_tiles<T, 1, kTransposed>(args, chunks, device, stream);
  if (tiles <= 2) return launch_tiles<T, 2, kTransposed>(args, chunks, device, stream);
  if (tiles <= 4) return launch_tiles<T, 4, kTransposed>(args, chunks, device, stream);
  return launch_tiles<T, 8, kTransposed>(args, chunks, device, stream);
}

template <typename T>
Status launch_direction(const sm80::FewArgs& args, int chunks, const DeviceInfo& device,
                        Stream stream) {
  return args.p.transposed ? launch_dtype<T, true>(args, chunks, device, stream)
                           : launch_dtype<T, false>(args, chunks, device, stream);
}

Status launch(sm80::FewArgs args, int chunks, const DeviceInfo& device, Stream stream) {
  const ProductParams& p = args.p;
  args.quads_aligned = aligned_rows(p.y, p.y_stride, p.dtype) &&
                       aligned_rows(p.residual, p.residual_stride, p.dtype) &&
                       aligned_rows(p.slope, p.slope_stride, p.dtype) &&
                       aligned_rows(p.slope_out, p.slope_out_stride, p.dtype);
  return args.p.dtype == DType::kBFloat16
             ? launch_direction<__nv_bfloat16>(args, chunks, device, stream)
             : launch_direction<__half>(args, chunks, device, stream);
}

int rank_chunks(int rank) { return (rank + sm80::kFewDepth - 1) / sm80::kFewDepth; }

}  // namespace

bool product_few_sm80_supports(const ProductParams& p) {
  if (p.tokens > kMostTokens || p.dtype == DType::kFloat32) return false;
  if (p.transposed && (p.residual != nullptr || p.x_others.given() || p.out_features % 8 != 0)) {
    return false;
  }
  const PlanHeader& h = *p.header;
  return h.block_size >= sm80::kFewDepth && h.rank % 8 == 0 && p.in_features % 8 == 0 &&
         aligned_rows(p.x, p.x_stride, p.dtype) && aligned_rows(p.blocks, 0, p.dtype) &&
         aligned_rows(p.t, p.t_stride, p.dtype) && aligned_rows(p.factor, p.factor_stride, p.dtype);
}

// With two thread blocks of 64 tokens for each multiprocessor product_sm90 takes up to 2.6 times as
// long, with four less (one H200; benchmarks/results/few_tokens_h200.json).
bool few_tokens_are_quick(int64_t tokens, int32_t outputs, const DeviceInfo& device,
                          int64_t always) {
  if (tokens <= always) return true;
  const int64_t blocks = groups_of(outputs) * ((tokens + kBlockTokens - 1) / kBlockTokens);
  return blocks <= 2 * device.num_sms;
}

Status launch_product_few_sm80(const ProductParams& p, const DeviceInfo& device, Stream stream) {
  const PlanHeader& h = *p.header;
  sm80::FewArgs args{};
  args.p = p;
  args.p.header = nullptr;
  args.row_ptr = p.plan + (p.transposed ? h.col_ptr_offset : h.row_ptr_offset);
  args.col_idx = p.plan + (p.transposed ? h.t_row_offset : h.col_idx_offset);
  args.block_idx = p.plan + h.t_block_offset;
  for (args.block_log2 = sm80::kFewDepthLog2; 1 << args.block_log2 < h.block_size;) {
    ++args.block_log2;
  }
  args.rank = h.rank;
  const int most = p.transposed ? h.max_col_blocks : h.max_row_blocks;
  const int chunks = most * (h.block_size / sm80::kFewDepth) + rank_chunks(h.rank);
  return launch(args, chunks, device, stream);
}

bool low_rank_few_sm80_supports(const LowRankParams& p) {
  return p.tokens <= kMostTokens && !p.transposed && p.dtype != DType::kFloat32 &&
         p.features % 8 == 0 && aligned_rows(p.x, p.x_stride, p.dtype) &&
         aligned_rows(p.factor, p.factor_stride, p.dtype);
}

// t = x · vᵀ is the low-rank term of a product without blocks whose "t" is x and whose "u" is v.
Status launch_low_rank_few_sm80(const LowRankParams& p, const DeviceInfo& device, Stream stream) {
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
  args.block_log2 = sm80::kFewDepthLog2;
  args.rank = p.features;
  return launch(args, rank_chunks(p.features), device, stream);
}

}  // namespace pixelfly
