#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "kernels/product_sm90.cuh"
#include "launch/alignment.h"
#include "launch/early_start.h"
#include "launch/launch_kernel.h"
#include "launch/low_rank_sm90.h"
#include "launch/product_sm90.h"
#include "launch/tensor_map.h"

namespace pixelfly {
namespace {

struct Tile {
  bool cooperative;
  bool plain;
  bool alone;  // rows, all of them
};

// Where tokens are columns, those of an item of the batch begin with a tile of their own.
int32_t token_tiles(const ProductParams& p) {
  const auto tiles = [](int64_t n) { return (n + kGroupTokens - 1) / kGroupTokens; };
  return static_cast<int32_t>(p.columns > 0 ? p.tokens / p.columns * tiles(p.columns)
                                            : tiles(p.tokens));
}

const GroupSection& section_of(const ProductParams& p) {
  return group_section(*p.header, p.transposed, token_tiles(p));
}

Tile choose_tile(const ProductParams& p) {
  const GroupSection& section = section_of(p);
  const bool active = p.slope_out != nullptr || p.activation != Activation::kNone;
  const bool has_aux = p.residual != nullptr || p.slope != nullptr;
  // Where all groups stream their weights, and many of them, it pays to read them once for two
  // token tiles, although epilogues then overlap less: 48 tiles a group gain 15 %, 128 gain 25 %.
  // 32 gain 5-12 % where both rows use every x tile, so that half of all loads are weights (a
  // forward that saves slopes: nothing), else nothing. A tile of blocks of 32 comes in four copies,
  // which take longer: 40 tiles gain 28 %, 30 at least 10 % (product_sm90_b32_h200.json).
  constexpr int kCooperativeTiles = 44, kCooperativeTilesOfSharedX = 32;
  const bool many = section.max_weights >= kCooperativeTiles || p.header->block_size == 32 ||
                    (section.max_weights >= kCooperativeTilesOfSharedX &&
                     section.max_weights == 2 * section.max_steps);
  const bool staged_beside_aux = p.slope_out != nullptr && p.residual != nullptr;
  return {section.resident_weights == 0 && many && !staged_beside_aux, !active && !has_aux,
          section.register_steps == kAloneRegisterSteps};
}

using Kernel = void (*)(GroupMaps, GroupArgs);

template <typename T, bool kQuads>
Kernel choose_thirds(const Tile& tile) {
  if constexpr (!kQuads) {
    if (tile.alone) return product_sm90<T, true, false, false, true, false, true, true>;
  }
  return tile.cooperative ? product_sm90<T, true, kQuads, true, true, false, true>
                          : product_sm90<T, true, kQuads, false, true, false, true>;
}

template <typename T, bool kTransposed, bool kColumns>
Kernel choose_alone(const Tile& tile) {
  return tile.plain ? product_sm90<T, kTransposed, false, false, true, kColumns, false, true>
                    : product_sm90<T, kTransposed, false, false, false, kColumns, false, true>;
}

template <typename T, bool kTransposed, bool kQuads>
Kernel choose_one(const Tile& tile) {
  if constexpr (!kQuads) {
    if (tile.alone) return choose_alone<T, kTransposed, false>(tile);
  }
  return tile.plain ? (tile.cooperative ? product_sm90<T, kTransposed, kQuads, true, true>
                                        : product_sm90<T, kTransposed, kQuads, false, true>)
                    : (tile.cooperative ? product_sm90<T, kTransposed, kQuads, true, false>
                                        : product_sm90<T, kTransposed, kQuads, false, false>);
}

template <typename T, bool kTransposed>
Kernel choose_columns(const Tile& tile) {
  if (tile.alone) return choose_alone<T, kTransposed, true>(tile);
  return tile.plain ? product_sm90<T, kTransposed, false, false, true, true>
                    : product_sm90<T, kTransposed, false, false, false, true>;
}

template <typename T>
Kernel choose(const ProductParams& p, const Tile& tile) {
  if (p.columns > 0) {
    return p.transposed ? choose_columns<T, true>(tile) : choose_columns<T, false>(tile);
  }
  const bool quads = p.header->block_size == 32;
  if (p.x_others.given()) {
    return quads ? choose_thirds<T, true>(tile) : choose_thirds<T, false>(tile);
  }
  return p.transposed
             ? (quads ? choose_one<T, true, true>(tile) : choose_one<T, true, false>(tile))
             : (quads ? choose_one<T, false, true>(tile) : choose_one<T, false, false>(tile));
}

}  // namespace

bool product_sm90_supports(const ProductParams& p, const DeviceInfo& device) {
  if (device.arch != 90 || p.dtype == DType::kFloat32 || section_of(p).num_groups == 0)
    return false;
  if (p.transposed && (p.slope_out != nullptr || p.activation != Activation::kNone)) return false;
  if (p.slope != nullptr && (p.residual != nullptr || !p.transposed)) return false;
  if (p.x_others.given() &&
      (p.columns > 0 || !p.transposed || p.residual != nullptr || p.slope != nullptr)) {
    return false;
  }
  if (p.columns > 0 && (p.header->block_size == 32 || p.header->rank > 0 || p.residual != nullptr ||
                        choose_tile(p).cooperative)) {
    return false;
  }
  auto aligned = [&](const void* data, int64_t stride) {
    if (p.columns > 0) stride = p.columns;
    return aligned_rows(data, stride, p.dtype);
  };
  auto aligned_slope = [&](const void* data, int64_t stride) {
    if (p.columns > 0) stride = p.columns;
    return aligned_rows(data, stride, slope_dtype(p.dtype));
  };
  return aligned(p.x, p.x_stride) && aligned_thirds(p.x_others, p.in_features, p.dtype) &&
         aligned(p.blocks, 0) && aligned(p.factor, p.factor_stride) && aligned(p.t, p.t_stride) &&
         aligned(p.residual, p.residual_stride) && aligned(p.y, p.y_stride) &&
         aligned_slope(p.slope, p.slope_stride) && aligned_slope(p.slope_out, p.slope_out_stride);
}

bool product_sm90_forms_t(const ProductParams& p, const DeviceInfo& device) {
  return p.factor_in != nullptr && section_of(p).ahead_blocks > 0 &&
         low_rank_sm90_supports(low_rank_of(p), device);
}

size_t product_workspace_sm90(const ProductParams& p) {
  return static_cast<size_t>(token_tiles(p)) * sizeof(int32_t);
}

Status launch_product_sm90(const ProductParams& p, const DeviceInfo& device, Stream stream) {
  if (p.tokens == 0) return Status::success();
  const PlanHeader& h = *p.header;
  const Tile tile = choose_tile(p);

  GroupMaps maps{};
  auto map_of = [&](DType dtype, CUtensorMap* out, const void* data, int64_t rows, int64_t cols,
                    int64_t stride, int box_rows, int box_cols = kGroupTile) {
    if (data == nullptr) {  // never used, but must be a valid parameter
      *out = maps.x;
      return Status::success();
    }
    return encode_tile_map(out, dtype, data, rows, cols, stride, box_rows, box_cols);
  };
  auto map = [&](auto... what) { return map_of(p.dtype, what...); };
  const int64_t b = h.block_size, T = p.tokens, columns = p.columns;
  auto map_activations = [&](DType dtype, CUtensorMap* out, const void* data, int64_t features,
                             int64_t stride, int box_tokens) {
    if (columns == 0 || data == nullptr) {
      return map_of(dtype, out, data, T, features, stride, box_tokens);
    }
    return encode_plane_map(out, dtype, data, T / columns, features, columns);
  };
  const int weight_box = b == 32 ? 32 : kGroupTile;
  const int64_t factor_rows = p.transposed ? h.rank : p.out_features;
  const int64_t factor_cols = p.transposed ? p.out_features : h.rank;
  const void* aux = p.residual != nullptr ? p.residual : p.slope;
  const int64_t aux_stride = p.residual != nullptr ? p.residual_stride : p.slope_stride;
  const DType slopes = slope_dtype(p.dtype), aux_dtype = p.residual != nullptr ? p.dtype : slopes;
  const int64_t x_features = p.in_features / (p.x_others.given() ? 3 : 1);
  const void* t = h.rank > 0 ? p.t : nullptr;
  const void* factor = h.rank > 0 ? p.factor : nullptr;
  const void* blocks = h.nnz > 0 ? p.blocks : nullptr;
  PIXELFLY_RETURN_IF_ERROR(
      map_activations(p.dtype, &maps.x, p.x, x_features, p.x_stride, kGroupTokens));
  for (int i = 0; i < 2; ++i) {
    PIXELFLY_RETURN_IF_ERROR(map(&maps.x_others[i], p.x_others.data[i], T, x_features,
                                 p.x_others.stride[i], kGroupTokens));
  }
  PIXELFLY_RETURN_IF_ERROR(map(&maps.t, t, T, h.rank, p.t_stride, kGroupTokens));
  PIXELFLY_RETURN_IF_ERROR(map(&maps.blocks, blocks, h.nnz * b, b, b, weight_box, weight_box));
  PIXELFLY_RETURN_IF_ERROR(
      map(&maps.factor, factor, factor_rows, factor_cols, p.factor_stride, weight_box, weight_box));
  PIXELFLY_RETURN_IF_ERROR(
      map_activations(aux_dtype, &maps.aux, aux, p.out_features, aux_stride, kGroupTokens));
  PIXELFLY_RETURN_IF_ERROR(
      map_activations(p.dtype, &maps.y, p.y, p.out_features, p.y_stride, kGroupTile));
  PIXELFLY_RETURN_IF_ERROR(map_activations(slopes, &maps.slope_out, p.slope_out, p.out_features,
                                           p.slope_out_stride, kGroupTile));

  GroupArgs args{};
  args.section = section_of(p);
  args.plan = p.plan;
  args.bias = p.bias;
  args.column_tiles = (p.columns + kGroupTokens - 1) / kGroupTokens;
  args.token_tiles = token_tiles(p);
  const GroupUnitList units =
      group_units(h, p.transposed, args.token_tiles, p.slope_out != nullptr);
  args.units_offset = units.offset;
  args.num_units = units.count;
  args.out_features = p.out_features;
  // The layout's, which may be rounded up where tokens are columns.
  const int32_t in_features = p.transposed ? h.out_features : h.in_features;
  args.num_x_tiles = (in_features + kGroupTile - 1) / kGroupTile;
  args.num_t_tiles = (h.rank + kGroupTile - 1) / kGroupTile;
  args.third_tiles = p.x_others.given() ? args.num_x_tiles / 3 : 0;
  args.weight_shift = b == 128 ? 1 : 0;
  args.aux_bytes = kGroupTokens * kGroupTile * static_cast<int32_t>(size_of(aux_dtype));
  args.early_start =
      product_starts_next_early(int64_t{args.token_tiles} * kGroupTokens, h, args.section);
  args.has_residual = p.residual != nullptr;
  args.has_slope = p.slope != nullptr;
  args.has_slope_out = p.slope_out != nullptr;
  args.activation = p.activation;

  const Kernel kernel =
      p.dtype == DType::kBFloat16 ? choose<__nv_bfloat16>(p, tile) : choose<__half>(p, tile);
  const int thread_blocks = std::min(device.num_sms, h.thread_blocks);
  if (p.factor_in == nullptr) {
    const int grid = std::min(args.num_units, thread_blocks);
    return launch_dependent_kernel(kernel, grid, kGroupThreads, kGroupSharedBytes, stream, maps,
                                   args);
  }
  // In proportion, on a device with fewer multiprocessors than the plan is made for.
  const int ahead = std::max(1, args.section.ahead_blocks * thread_blocks / h.thread_blocks);
  const int grid = std::max(1, std::min(args.num_units, thread_blocks - ahead));
  if (p.workspace == nullptr) return Status::invalid("this product needs a workspace");
  auto* ready = static_cast<int32_t*>(p.workspace);
  args.ready = ready;
  PIXELFLY_RETURN_IF_ERROR(
      launch_low_rank_ahead_sm90(low_rank_of(p), device, ahead, ready, stream));
  return launch_dependent_kernel(kernel, grid, kGroupThreads, kGroupSharedBytes, stream, maps,
                                 args);
}

}  // namespace pixelfly
