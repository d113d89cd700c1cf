#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "kernels/product_all_rows_sm90.cuh"
#include "launch/alignment.h"
#include "launch/early_start.h"
#include "launch/heuristics.h"
#include "launch/launch_kernel.h"
#include "launch/product_all_rows_sm90.h"
#include "launch/tensor_map.h"

namespace pixelfly {
namespace {

const AllRowsSection& section_of(const ProductParams& p) {
  return p.transposed ? p.header->transposed_all : p.header->forward_all;
}

Status encode(AllRowsMaps& maps, const ProductParams& p) {
  const PlanHeader& h = *p.header;
  const int64_t b = h.block_size;
  const auto map = [&](auto... what) { return encode_tile_map(what...); };
  const DType d = p.dtype;
  PIXELFLY_RETURN_IF_ERROR(
      map(&maps.x, d, p.x, p.tokens, p.in_features, p.x_stride, kGroupTile, kGroupTile));
  PIXELFLY_RETURN_IF_ERROR(
      map(&maps.y, d, p.y, p.tokens, p.out_features, p.y_stride, kGroupTile, kGroupTile));
  // What is not given is never used, but must be a valid parameter.
  maps.blocks = maps.factor_in = maps.factor = maps.t = maps.y;
  if (h.nnz > 0) {
    PIXELFLY_RETURN_IF_ERROR(
        map(&maps.blocks, d, p.blocks, h.nnz * b, b, b, kGroupTile, kGroupTile));
  }
  if (h.rank == 0) return Status::success();
  const int64_t rank = h.rank;
  PIXELFLY_RETURN_IF_ERROR(p.transposed ? map(&maps.factor_in, d, p.factor_in, p.in_features, rank,
                                              p.factor_in_stride, kGroupTile, kAllRowsRanks)
                                        : map(&maps.factor_in, d, p.factor_in, rank, p.in_features,
                                              p.factor_in_stride, kAllRowsRanks, kGroupTile));
  PIXELFLY_RETURN_IF_ERROR(p.transposed ? map(&maps.factor, d, p.factor, rank, p.out_features,
                                              p.factor_stride, kGroupTile, kGroupTile)
                                        : map(&maps.factor, d, p.factor, p.out_features, rank,
                                              p.factor_stride, kGroupTile, kGroupTile));
  return map(&maps.t, d, p.t, p.tokens, rank, p.t_stride, kGroupTile, kGroupTile);
}

template <typename T, bool kTransposed, bool kLowRank>
Status launch(const AllRowsMaps& maps, const AllRowsArgs& args, int thread_blocks, Stream stream) {
  const dim3 grid(1, 1, static_cast<unsigned>(thread_blocks));
  return launch_dependent_cluster(product_all_rows_sm90<T, kTransposed, kLowRank>, grid,
                                  kLowRank ? 2 : 1, kAllRowsThreads,
                                  all_rows::Layout<kLowRank>::kBytes + 1008, stream, maps, args);
}

template <typename T>
Status launch(const AllRowsMaps& maps, const AllRowsArgs& args, bool transposed, bool low_rank,
              int thread_blocks, Stream stream) {
  if (transposed) {
    return low_rank ? launch<T, true, true>(maps, args, thread_blocks, stream)
                    : launch<T, true, false>(maps, args, thread_blocks, stream);
  }
  return low_rank ? launch<T, false, true>(maps, args, thread_blocks, stream)
                  : launch<T, false, false>(maps, args, thread_blocks, stream);
}

}  // namespace

bool product_all_rows_sm90_supports(const ProductParams& p, const DeviceInfo& device) {
  const AllRowsSection& section = section_of(p);
  if (device.arch != 90 || p.dtype == DType::kFloat32 || section.parts == 0 ||
      device.num_sms < section.parts) {
    return false;
  }
  if (p.columns > 0 || p.x_others.given() || p.residual != nullptr || p.slope != nullptr ||
      p.slope_out != nullptr || p.activation != Activation::kNone) {
    return false;
  }
  const bool forms_t = p.header->rank == 0 || p.factor_in != nullptr;
  const auto aligned = [&](const void* data, int64_t stride) {
    return aligned_rows(data, stride, p.dtype);
  };
  return forms_t && aligned(p.x, p.x_stride) && aligned(p.blocks, 0) && aligned(p.y, p.y_stride) &&
         aligned(p.factor_in, p.factor_in_stride) && aligned(p.factor, p.factor_stride) &&
         aligned(p.t, p.t_stride);
}

Status launch_product_all_rows_sm90(const ProductParams& p, const DeviceInfo& device,
                                    Stream stream) {
  const PlanHeader& h = *p.header;
  AllRowsMaps maps;
  PIXELFLY_RETURN_IF_ERROR(encode(maps, p));
  AllRowsArgs args{};
  args.section = section_of(p);
  args.plan = p.plan;
  args.bias = p.bias;
  args.out_features = p.out_features;
  args.weight_shift = h.block_size == 2 * kGroupTile ? 1 : 0;
  args.early_start = p.tokens <= kEarlyStartTokens || h.rank > 0;
  const int parts = args.section.parts;
  const AllRowsTurns turns = all_rows_turns(p, device);
  args.whole_tiles = turns.whole_tiles;
  args.half_tiles = turns.half_tiles;
  const int thread_blocks = std::min(turns.sets, turns.whole_tiles + turns.half_tiles) * parts;
  return p.dtype == DType::kBFloat16
             ? launch<__nv_bfloat16>(maps, args, p.transposed, h.rank > 0, thread_blocks, stream)
             : launch<__half>(maps, args, p.transposed, h.rank > 0, thread_blocks, stream);
}

}  // namespace pixelfly
