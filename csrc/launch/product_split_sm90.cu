#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <utility>

#include "kernels/product_split_sm90.cuh"
#include "launch/early_start.h"
#include "launch/launch_kernel.h"
#include "launch/product_sm90.h"
#include "launch/product_split_sm90.h"
#include "launch/tensor_map.h"

namespace pixelfly {
namespace {

template <typename T>
Status launch(const SplitMaps& maps, const SplitArgs& args, dim3 grid, int threads,
              int shared_bytes, Stream stream) {
  const auto kernel =
      args.p.transposed ? product_split_sm90<T, true> : product_split_sm90<T, false>;
  return launch_dependent_cluster(kernel, grid, static_cast<int>(grid.z), threads, shared_bytes,
                                  stream, maps, args);
}

Status encode(SplitMaps& maps, const ProductParams& p, int tokens) {
  const PlanHeader& h = *p.header;
  const int64_t b = h.block_size, width = p.in_features / (p.x_others.given() ? 3 : 1);
  PIXELFLY_RETURN_IF_ERROR(
      encode_tile_map(&maps.x[0], p.dtype, p.x, p.tokens, width, p.x_stride, tokens));
  // What is not given is never used, but must be a valid parameter.
  maps.x[1] = maps.x[2] = maps.t = maps.blocks = maps.factor = maps.x[0];
  for (int i = 0; p.x_others.given() && i < 2; ++i) {
    PIXELFLY_RETURN_IF_ERROR(encode_tile_map(&maps.x[1 + i], p.dtype, p.x_others.data[i], p.tokens,
                                             width, p.x_others.stride[i], tokens));
  }
  if (h.rank > 0) {
    PIXELFLY_RETURN_IF_ERROR(
        encode_tile_map(&maps.t, p.dtype, p.t, p.tokens, h.rank, p.t_stride, tokens));
    PIXELFLY_RETURN_IF_ERROR(
        encode_tile_map(&maps.factor, p.dtype, p.factor, p.transposed ? h.rank : p.out_features,
                        p.transposed ? p.out_features : h.rank, p.factor_stride));
  }
  if (h.nnz == 0) return Status::success();
  return encode_tile_map(&maps.blocks, p.dtype, p.blocks, h.nnz * b, b, b);
}

}  // namespace

bool product_split_sm90_supports(const ProductParams& p, const DeviceInfo& device) {
  constexpr int64_t kMostTokens = int64_t{65535} * kSplitTokens;  // thread blocks in a grid's y
  return product_sm90_supports(p, device) && p.header->block_size >= kGroupTile && p.columns == 0 &&
         p.tokens <= kMostTokens && !(p.transposed && p.residual != nullptr);
}

Status launch_product_split_sm90(const ProductParams& p, const SplitTile& tile,
                                 const DeviceInfo& device, Stream stream) {
  const PlanHeader& h = *p.header;
  const int tokens = tile.warpgroups * kSplitTokens;
  SplitMaps maps;
  PIXELFLY_RETURN_IF_ERROR(encode(maps, p, tokens));
  SplitArgs args{};
  args.p = p;
  args.p.header = nullptr;
  args.row_ptr = p.plan + (p.transposed ? h.col_ptr_offset : h.row_ptr_offset);
  args.col_idx = p.plan + (p.transposed ? h.t_row_offset : h.col_idx_offset);
  args.block_idx = p.plan + h.t_block_offset;
  args.block_shift = h.block_size == 2 * kGroupTile ? 1 : 0;
  args.rank_tiles = group_tiles(h.rank);
  const int rows = group_tiles(p.out_features);
  args.shared_rows = rows;
  if (tile.long_only) {
    const LongRows& long_rows = p.transposed ? h.long_cols : h.long_rows;
    args.order = p.plan + long_rows.order_offset;
    args.shared_rows = long_rows.count;
  }
  args.rows = rows;
  args.third_tiles = p.x_others.given()
                         ? group_tiles(p.in_features) / 3
                         : (p.transposed ? h.num_rows : h.num_cols) << args.block_shift;
  args.stages = split_stages(tile.warpgroups, tile.cluster);
  args.early_start = p.tokens <= kEarlyStartTokens;
  const int others = (rows - args.shared_rows + tile.cluster - 1) / tile.cluster;
  dim3 grid(static_cast<unsigned>(args.shared_rows + others),
            static_cast<unsigned>((p.tokens + tokens - 1) / tokens),
            static_cast<unsigned>(tile.cluster));
  if (tile.long_only) std::swap(grid.x, grid.y);
  const int threads = tile.warpgroups * 128 + 32;
  // Larger clusters do not fill every group of multiprocessors, and were not tried.
  const bool alone = tile.cluster <= 2 && int64_t{grid.x} * grid.y * grid.z <= device.num_sms;
  const int shared_bytes = alone ? kSplitSharedBytesAlone : kSplitSharedBytes;
  return p.dtype == DType::kBFloat16
             ? launch<__nv_bfloat16>(maps, args, grid, threads, shared_bytes, stream)
             : launch<__half>(maps, args, grid, threads, shared_bytes, stream);
}

}  // namespace pixelfly
