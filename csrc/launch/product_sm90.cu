#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "kernels/product_sm90.cuh"
#include "launch/alignment.h"
#include "launch/launch_kernel.h"
#include "launch/product_sm90.h"
#include "launch/tensor_map.h"

namespace pixelfly {
namespace {

struct Tile {
  int stages;
  int staging_tiles;
  int resident_tiles;
  int shared_bytes;
};

const GroupSection& section_of(const ProductParams& p) {
  return p.transposed ? p.header->transposed : p.header->forward;
}

// As many stages as fit: 64-96 KB in flight reach L2's rate, each 16 KB more gains 3-6 %. Weights
// stay for every group within kGroupResidentTiles; larger groups use the weight region as a ring,
// so it must then hold two tiles a stage.
Tile choose_tile(const ProductParams& p, const DeviceInfo& device) {
  constexpr int kMinStages = 4;  // fewer cannot hide L2: stream the weights instead
  const GroupSection& section = section_of(p);
  const int budget = device.max_shared_bytes - 1024 - static_cast<int>(sizeof(GroupShared));
  auto bytes = [&](int stages, int staging, int resident) {
    const bool streams = section.max_weights > resident;
    const int weights = streams ? std::max(resident, 2 * stages) : resident;
    return stages * kGroupXBytes + (weights + 2 * staging) * kGroupTileBytes;
  };
  auto fit = [&](int staging, int resident) {
    int stages = kMaxGroupStages;
    while (stages > 0 && bytes(stages, staging, resident) > budget) --stages;
    return Tile{stages, staging, resident, 1024 + bytes(stages, staging, resident)};
  };
  // A second staging tile pays only where the epilogue is long.
  if (p.preact != nullptr || p.activation != Activation::kNone) {
    const Tile tile = fit(2, section.resident_weights);
    if (tile.stages > kMinStages) return tile;
  }
  const Tile tile = fit(1, section.resident_weights);
  return tile.stages >= kMinStages ? tile : fit(1, 0);
}

template <typename T, bool kTransposed, bool kQuads>
Status launch_one(const GroupMaps& maps, const GroupArgs& args, int grid, int shared_bytes,
                  Stream stream) {
  return launch_kernel(product_sm90<T, kTransposed, kQuads>, grid, kGroupThreads, shared_bytes,
                       stream, maps, args);
}

template <typename T>
Status launch(const ProductParams& p, const GroupMaps& maps, const GroupArgs& args, int grid,
              int shared_bytes, Stream stream) {
  const bool quads = p.header->block_size == 32;
  auto kernel = p.transposed ? (quads ? launch_one<T, true, true> : launch_one<T, true, false>)
                             : (quads ? launch_one<T, false, true> : launch_one<T, false, false>);
  return kernel(maps, args, grid, shared_bytes, stream);
}

}  // namespace

bool product_sm90_supports(const ProductParams& p, const DeviceInfo& device) {
  if (device.arch != 90 || p.dtype == DType::kFloat32 || section_of(p).num_groups == 0)
    return false;
  if (p.z != nullptr && (p.residual != nullptr || !p.transposed)) return false;
  if (p.transposed && p.z == nullptr && p.activation != Activation::kNone) return false;
  auto aligned = [&](const void* data, int64_t stride) {
    return aligned_rows(data, stride, p.dtype);
  };
  return aligned(p.x, p.x_stride) && aligned(p.blocks, 0) && aligned(p.factor, p.factor_stride) &&
         aligned(p.t, p.t_stride) && aligned(p.residual, p.residual_stride) &&
         aligned(p.z, p.z_stride) && aligned(p.y, p.y_stride) && aligned(p.preact, p.preact_stride);
}

Status launch_product_sm90(const ProductParams& p, const DeviceInfo& device, Stream stream) {
  if (p.tokens == 0) return Status::success();
  const PlanHeader& h = *p.header;
  const Tile tile = choose_tile(p, device);

  GroupMaps maps;
  auto map = [&](CUtensorMap* out, const void* data, int64_t rows, int64_t cols, int64_t stride,
                 int box_rows, int box_cols = kGroupTile) {
    // Absent operands get x's map: it is never used, but must be a valid parameter.
    if (data == nullptr) {
      return encode_tile_map(out, p.dtype, p.x, p.tokens, p.in_features, p.x_stride);
    }
    return encode_tile_map(out, p.dtype, data, rows, cols, stride, box_rows, box_cols);
  };
  const int64_t b = h.block_size, T = p.tokens;
  const int weight_box = b == 32 ? 32 : kGroupTile;
  const int64_t factor_rows = p.transposed ? h.rank : p.out_features;
  const int64_t factor_cols = p.transposed ? p.out_features : h.rank;
  const void* aux = p.residual != nullptr ? p.residual : p.z;
  const int64_t aux_stride = p.residual != nullptr ? p.residual_stride : p.z_stride;
  const void* t = h.rank > 0 ? p.t : nullptr;
  const void* factor = h.rank > 0 ? p.factor : nullptr;
  const void* blocks = h.nnz > 0 ? p.blocks : nullptr;
  PIXELFLY_RETURN_IF_ERROR(map(&maps.x, p.x, T, p.in_features, p.x_stride, kGroupTokens));
  PIXELFLY_RETURN_IF_ERROR(map(&maps.t, t, T, h.rank, p.t_stride, kGroupTokens));
  PIXELFLY_RETURN_IF_ERROR(map(&maps.blocks, blocks, h.nnz * b, b, b, weight_box, weight_box));
  PIXELFLY_RETURN_IF_ERROR(
      map(&maps.factor, factor, factor_rows, factor_cols, p.factor_stride, weight_box, weight_box));
  PIXELFLY_RETURN_IF_ERROR(map(&maps.aux, aux, T, p.out_features, aux_stride, kGroupTokens));
  PIXELFLY_RETURN_IF_ERROR(map(&maps.y, p.y, T, p.out_features, p.y_stride, kGroupTile));
  PIXELFLY_RETURN_IF_ERROR(
      map(&maps.preact, p.preact, T, p.out_features, p.preact_stride, kGroupTile));

  GroupArgs args{};
  args.section = section_of(p);
  args.plan = p.plan;
  args.bias = p.bias;
  args.token_tiles = static_cast<int32_t>((T + kGroupTokens - 1) / kGroupTokens);
  args.out_features = p.out_features;
  args.num_x_tiles = (p.in_features + kGroupTile - 1) / kGroupTile;
  args.weight_shift = b == 128 ? 1 : 0;
  args.stages = tile.stages;
  args.staging_tiles = tile.staging_tiles;
  args.resident_tiles = tile.resident_tiles;
  args.has_preact = p.preact != nullptr;
  args.has_residual = p.residual != nullptr;
  args.has_z = p.z != nullptr;
  args.activation = p.activation;

  const int grid = std::min(args.section.num_units, device.num_sms);
  return p.dtype == DType::kBFloat16
             ? launch<__nv_bfloat16>(p, maps, args, grid, tile.shared_bytes, stream)
             : launch<__half>(p, maps, args, grid, tile.shared_bytes, stream);
}

}  // namespace pixelfly
