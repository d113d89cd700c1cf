// What product_all_rows_sm90's thread blocks work on and with: arguments, shared memory, turns.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "pixelfly/params.h"

namespace pixelfly {

struct AllRowsMaps {
  CUtensorMap x;          // [T, in], box 64 x 64
  CUtensorMap blocks;     // [nnz * b, b], box 64 x 64
  CUtensorMap factor_in;  // v [r, K], box 32 x 64; transposed: u [N, r], box 64 x 32
  CUtensorMap factor;     // u [N, r]; transposed: v [r, K]; box 64 x 64
  CUtensorMap t;          // [T, r], box 64 x 64
  CUtensorMap y;          // [T, out], box 64 x 64
};

struct AllRowsArgs {
  AllRowsSection section;
  const int32_t* plan;
  const void* bias;
  int32_t whole_tiles;  // of kAllRowsTokens tokens
  int32_t half_tiles;   // of half as many: those that follow
  int32_t out_features;
  int32_t weight_shift;  // log2(b / 64)
  bool early_start;      // the next kernel may be placed meanwhile
};

constexpr int kAllRowsTokens = 128;
constexpr int kAllRowsThreads = 384;
constexpr int kAllRowsRanks = 32;  // of t, formed by either thread block

namespace all_rows {

constexpr int kHalfTokens = kAllRowsTokens / 2;
constexpr int kTileBytes = kGroupTile * kGroupTile * 2;
constexpr int kXBytes = 2 * kTileBytes;
constexpr int kFactorBytes = kAllRowsRanks * kGroupTile * 2;
constexpr int kWeightStages = 6;

// Shared memory, from an address that is a multiple of 1024.
template <bool kLowRank>
struct Layout {
  static constexpr int kXStages = kLowRank ? 4 : 6;
  static constexpr int kXStageBytes = kXBytes + (kLowRank ? kFactorBytes : 0);
  static constexpr int kWeights = kXStages * kXStageBytes;
  static constexpr int kStaging = kWeights + 2 * kWeightStages * kTileBytes;
  static constexpr int kT = kStaging + 2 * 2 * kTileBytes;
  static constexpr int kBarriers = kT + (kLowRank ? kXBytes : 0);
  static constexpr int kUses = kBarriers + (2 * kXStages + 4 * kWeightStages + 2) * 8;
  static constexpr int kBytes = kUses + kMostAllRowsColumns * 4;
  static_assert(kBytes + 1008 <= 227 * 1024, "what Hopper has, and what aligns it");

  uint32_t base;

  __device__ uint32_t x(int stage) const { return base + stage * kXStageBytes; }
  __device__ uint32_t factor(int stage) const { return x(stage) + kXBytes; }
  __device__ uint32_t weight(int consumer, int stage) const {
    return base + kWeights + (consumer * kWeightStages + stage) * kTileBytes;
  }
  __device__ uint32_t staging(int consumer) const {
    return base + kStaging + consumer * 2 * kTileBytes;
  }
  __device__ uint32_t t() const { return base + kT; }
  __device__ uint32_t x_full(int stage) const { return base + kBarriers + stage * 8; }
  __device__ uint32_t x_empty(int stage) const { return x_full(kXStages + stage); }
  __device__ uint32_t weight_full(int consumer, int stage) const {
    return x_full(2 * kXStages + 2 * kWeightStages * consumer + stage);
  }
  __device__ uint32_t weight_empty(int consumer, int stage) const {
    return weight_full(consumer, kWeightStages + stage);
  }
  __device__ uint32_t t_full() const { return x_full(2 * kXStages + 4 * kWeightStages); }
  __device__ uint32_t t_free() const { return t_full() + 8; }
  __device__ uint32_t uses(int column) const { return base + kUses + column * 4; }
};

// A thread block's way through the token tiles.
struct Turn {
  const AllRowsArgs& args;
  int tile, part;

  __device__ explicit Turn(const AllRowsArgs& a)
      : args(a), tile(blockIdx.z / a.section.parts), part(blockIdx.z % a.section.parts) {}
  __device__ bool more() const { return tile < args.whole_tiles + args.half_tiles; }
  __device__ bool whole() const { return tile < args.whole_tiles; }
  __device__ int first_token() const {
    return tile * kHalfTokens + min(tile, args.whole_tiles) * kHalfTokens;
  }
  __device__ int halves() const { return whole() ? 2 : 1; }
  __device__ void next() {
    tile += gridDim.z / args.section.parts;
    if (++part == args.section.parts) part = 0;
  }
  __device__ const AllRowsPart& rows() const {
    return reinterpret_cast<const AllRowsPart*>(args.plan + args.section.parts_offset)[part];
  }
};

}  // namespace all_rows

}  // namespace pixelfly
