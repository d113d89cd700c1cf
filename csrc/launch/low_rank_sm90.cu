#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "kernels/low_rank_ahead_sm90.cuh"
#include "kernels/low_rank_sm90.cuh"
#include "launch/alignment.h"
#include "launch/early_start.h"
#include "launch/launch_kernel.h"
#include "launch/low_rank_sm90.h"
#include "launch/tensor_map.h"

namespace pixelfly {
namespace {

// Thread blocks that share a multiprocessor, at most.
constexpr int kMostShare = 3;

int tiles(int64_t n, int tile = kLowRankTile) { return static_cast<int>((n + tile - 1) / tile); }

// Tokens of a thread block.
int tokens_of(const LowRankParams& p, const DeviceInfo& device) {
  const int64_t blocks = int64_t{tiles(p.tokens)} * tiles(p.rank);
  return blocks <= kMostShare * device.num_sms ? kLowRankTile : 2 * kLowRankTile;
}

// As many as leave room for the thread blocks that have to share a multiprocessor. Clusters of four
// or eight cannot be placed on all multiprocessors (on 120 of an H200's 132), should each thread
// block need its own.
int stages_for(const dim3& grid, int tokens, int num_sms) {
  const auto thread_blocks = int64_t{grid.x} * grid.y * grid.z;
  const int alone = grid.z <= 2 ? num_sms : num_sms * 3 / 4;
  if (thread_blocks <= alone) return kLowRankMaxStages;
  const bool two_share = thread_blocks <= 2 * num_sms;
  return tokens == kLowRankTile ? (two_share ? 6 : 4) : (two_share ? 4 : 3);
}

template <typename T, int kTokens>
Status launch(const LowRankMaps& maps, const LowRankParams& p, const LowRankArgs& args, dim3 grid,
              Stream stream) {
  const auto kernel = p.x_others.given() ? low_rank_sm90<T, true, true, kTokens>
                      : p.transposed     ? low_rank_sm90<T, true, false, kTokens>
                                         : low_rank_sm90<T, false, false, kTokens>;
  const int shared_bytes = args.stages * low_rank_stage_bytes(kTokens) + 1024;
  return launch_dependent_cluster(kernel, grid, static_cast<int>(grid.z), kLowRankThreads,
                                  shared_bytes, stream, maps, args);
}

template <typename T>
Status launch(int tokens, const LowRankMaps& maps, const LowRankParams& p, const LowRankArgs& args,
              dim3 grid, Stream stream) {
  return tokens == kLowRankTile ? launch<T, kLowRankTile>(maps, p, args, grid, stream)
                                : launch<T, 2 * kLowRankTile>(maps, p, args, grid, stream);
}

template <typename T>
Status launch_ahead(const LowRankMaps& maps, const LowRankParams& p, const AheadArgs& args,
                    unsigned grid, int shared_bytes, Stream stream) {
  const auto kernel = p.x_others.given() ? low_rank_ahead_sm90<T, true, true>
                      : p.transposed     ? low_rank_ahead_sm90<T, true, false>
                                         : low_rank_ahead_sm90<T, false, false>;
  return launch_dependent_kernel(kernel, grid, kAheadThreads, shared_bytes, stream, maps, args);
}

// Maps of x and t with boxes of so many tokens.
Status encode(LowRankMaps& maps, const LowRankParams& p, int tokens, int tokens_of_t) {
  const int64_t rows = p.transposed ? p.features : p.rank;
  const int64_t cols = p.transposed ? p.rank : p.features;
  const bool thirds = p.x_others.given();
  const int64_t width = p.features / (thirds ? 3 : 1);
  PIXELFLY_RETURN_IF_ERROR(
      encode_tile_map(&maps.x[0], p.dtype, p.x, p.tokens, width, p.x_stride, tokens));
  for (int i = 0; i < 2; ++i) {
    maps.x[1 + i] = maps.x[0];  // must be a valid parameter
    if (thirds) {
      PIXELFLY_RETURN_IF_ERROR(encode_tile_map(&maps.x[1 + i], p.dtype, p.x_others.data[i],
                                               p.tokens, width, p.x_others.stride[i], tokens));
    }
  }
  PIXELFLY_RETURN_IF_ERROR(
      encode_tile_map(&maps.factor, p.dtype, p.factor, rows, cols, p.factor_stride));
  return encode_tile_map(&maps.t, p.dtype, p.t, p.tokens, p.rank, p.t_stride, tokens_of_t);
}

}  // namespace

bool low_rank_sm90_supports(const LowRankParams& p, const DeviceInfo& device) {
  if (p.x_others.given() && !p.transposed) return false;
  return device.arch == 90 && p.dtype != DType::kFloat32 &&
         aligned_rows(p.x, p.x_stride, p.dtype) &&
         aligned_thirds(p.x_others, p.features, p.dtype) &&
         aligned_rows(p.factor, p.factor_stride, p.dtype) && aligned_rows(p.t, p.t_stride, p.dtype);
}

// Twice as many while all find an idle multiprocessor and have a few steps each, if that saves more
// than adding their sums takes.
int low_rank_cluster(const LowRankParams& p, const DeviceInfo& device) {
  constexpr int kMost = 8, kFewestSteps = 4, kStepsOfAdding = 8;
  const int blocks = tiles(p.tokens) * tiles(p.rank), steps = tiles(p.features);
  int cluster = 1;
  while (cluster < kMost && 2 * cluster * blocks <= device.num_sms &&
         2 * cluster * kFewestSteps <= steps) {
    cluster *= 2;
  }
  return steps - steps / cluster >= kStepsOfAdding ? cluster : 1;
}

Status launch_low_rank_sm90(const LowRankParams& p, const DeviceInfo& device, Stream stream) {
  const int tokens = tokens_of(p, device), cluster = low_rank_cluster(p, device);
  LowRankMaps maps;
  PIXELFLY_RETURN_IF_ERROR(encode(maps, p, tokens, tokens / cluster));
  const dim3 grid(tiles(p.tokens, tokens), tiles(p.rank), cluster);
  const LowRankArgs args{tiles(p.features), stages_for(grid, tokens, device.num_sms),
                         p.tokens <= kEarlyStartTokens};
  return p.dtype == DType::kBFloat16 ? launch<__nv_bfloat16>(tokens, maps, p, args, grid, stream)
                                     : launch<__half>(tokens, maps, p, args, grid, stream);
}

Status launch_low_rank_ahead_sm90(const LowRankParams& p, const DeviceInfo& device,
                                  int thread_blocks, int32_t* ready, Stream stream) {
  LowRankMaps maps;
  PIXELFLY_RETURN_IF_ERROR(encode(maps, p, kGroupTokens, kGroupTokens));
  AheadArgs args{};
  args.num_tiles = tiles(p.features);
  args.token_tiles = static_cast<int32_t>((p.tokens + kGroupTokens - 1) / kGroupTokens);
  args.ready = ready;
  // A factor that stays leaves fewer stages, and what is in flight bounds the rate: 768 features
  // are as fast either way, 1024 (five stages) lose 6 %.
  const int budget =
      device.max_shared_bytes - 1024 - static_cast<int>(sizeof(AheadShared)) - kGroupXBytes;
  constexpr int kStagesBesideFactor = 7;
  const int kept = args.num_tiles * kGroupTileBytes;
  args.resident = kept + kStagesBesideFactor * kGroupXBytes <= budget;
  args.stages =
      std::min(kMaxAheadStages, args.resident ? (budget - kept) / kGroupXBytes
                                              : budget / (kGroupXBytes + kGroupTileBytes));
  const int factor = args.resident ? kept : args.stages * kGroupTileBytes;
  const int shared_bytes = 1024 + (args.stages + 1) * kGroupXBytes + factor;
  const auto grid = static_cast<unsigned>(std::min(thread_blocks, args.token_tiles));
  return p.dtype == DType::kBFloat16
             ? launch_ahead<__nv_bfloat16>(maps, p, args, grid, shared_bytes, stream)
             : launch_ahead<__half>(maps, p, args, grid, shared_bytes, stream);
}

}  // namespace pixelfly
