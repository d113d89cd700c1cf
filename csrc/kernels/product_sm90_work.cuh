// What product_sm90's thread blocks work on and with: arguments, shared memory, ring, units.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "device/shared_memory.cuh"
#include "kernels/ring.cuh"
#include "pixelfly/params.h"

namespace pixelfly {

// Where tokens are columns, the maps of x, aux, y and slope_out have three dimensions, [samples]
// [features][columns], and boxes of 64 x 64.
struct GroupMaps {
  CUtensorMap x;            // [T, in] or, with kThirds, its first third, box 128 x 64
  CUtensorMap t;            // [T, r], box 128 x 64
  CUtensorMap blocks;       // [nnz * b, b], box 64 x 64 (b = 32: 32 x 32)
  CUtensorMap factor;       // u [N, r] (transposed: v [r, K]), the same box
  CUtensorMap aux;          // residual or slope (perhaps in codes), [T, out], box 128 x 64
  CUtensorMap y;            // [T, out], box 64 x 64
  CUtensorMap slope_out;    // [T, out] (perhaps in codes), box 64 x 64
  CUtensorMap x_others[2];  // kThirds: as x
};

struct GroupArgs {
  GroupSection section;
  const int32_t* plan;
  int32_t units_offset;  // of the list for so many tokens
  int32_t num_units;
  const void* bias;
  int32_t token_tiles;   // of kGroupTokens
  int32_t column_tiles;  // of a sample, where tokens are columns
  int32_t out_features;
  int32_t num_x_tiles;  // tiles of x; those of t follow
  int32_t num_t_tiles;
  int32_t weight_shift;  // log2(b / 64)
  int32_t aux_bytes;     // of 128 tokens' residual or slope tile, at the end of its stage
  bool has_residual;
  bool has_slope;      // transposed only
  bool has_slope_out;  // not transposed only
  bool early_start;    // the next kernel may be placed meanwhile
  Activation activation;
  int32_t third_tiles;   // of x in each of its thirds, if it is in thirds; else 0
  const int32_t* ready;  // a flag for each tile of t that low_rank_ahead_sm90 forms, or null

  __device__ bool has_aux() const { return has_residual || has_slope; }
  // Else outputs replace the residual or slope.
  __device__ bool has_staging() const { return has_slope_out || !has_aux(); }
};

constexpr int kGroupTokens = 128;
constexpr int kGroupThreads = 384;
constexpr int kGroupXBytes = kGroupTokens * kGroupTile * 2;
constexpr int kGroupTileBytes = kGroupTile * kGroupTile * 2;
// Before the ring: ones in the operands' type, and what aligns the ring to 1024 bytes.
constexpr int kGroupOnesBytes = 128;
constexpr int kGroupFrontBytes = kGroupOnesBytes + 1024 - 16;

struct GroupShared {
  uint64_t full[kMaxGroupStages];
  uint64_t empty[kMaxGroupStages];
  uint64_t weights_free;
};

constexpr int kGroupSharedBytes = kGroupFrontBytes + kGroupSharedTiles * kGroupTileBytes;
static_assert(kGroupSharedBytes + sizeof(GroupShared) <= 227 * 1024, "what Hopper has");

namespace groups {

// Shared memory, cut by each thread block for itself: as many stages as fit beside the weights of
// the groups that it serves (64-96 KB of x under way reach L2's rate, each 16 KB more gains 3-6 %).
// Where one group reads much more of x than the others, these get no more stages than they need:
// what is under way for them delays its loads (planner/group_units.cpp).
struct Layout {
  int stages, staging_tiles;
  uint32_t base, stage_bytes, staging, weights, ones, barriers;

  __device__ Layout(uint32_t dynamic, const GroupArgs& args, uint32_t shared, bool cooperative)
      : base(device::opaque((dynamic + kGroupOnesBytes + 1023) & ~1023u)),
        stage_bytes(cooperative ? 2 * kGroupXBytes : kGroupXBytes),
        ones(device::opaque(dynamic)),
        barriers(device::opaque(shared)) {
    int kept = 0, most = 0;
    bool streams = false;
    const auto* units = reinterpret_cast<const GroupUnit*>(args.plan + args.units_offset);
    for (int index = blockIdx.x; index < args.num_units; index += gridDim.x) {
      const int tiles = __ldg(&units[index].weights);
      most = max(most, __ldg(&units[index].stages));
      if (tiles == kGroupStreams) {
        streams = true;
      } else {
        kept = max(kept, tiles);
      }
    }
    const int x_tiles = cooperative ? 4 : 2;
    const auto fit = [&](int staging_tiles) {
      const int left = kGroupSharedTiles - 2 * staging_tiles;
      const int beside_kept = (left - kept) / x_tiles;
      return min(kMaxGroupStages, streams ? min(beside_kept, left / (x_tiles + 2)) : beside_kept);
    };
    // A second staging tile pays where the epilogue is long, or where it leaves enough stages.
    const bool active = args.has_slope_out || args.activation != Activation::kNone;
    const bool wide = cooperative || fit(2) >= (active ? 5 : 6);
    staging_tiles = !args.has_staging() ? 0 : wide ? 2 : 1;
    stages = fit(staging_tiles);
    if (!args.has_aux()) stages = min(stages, most);  // residuals and slopes take stages too
    staging = base + stages * stage_bytes;
    weights = staging + 2 * staging_tiles * kGroupTileBytes;
  }
  __device__ uint32_t stage(int s) const { return base + s * stage_bytes; }
  // Where a step's weight tiles lie: at their slot, or in the ring beside the step's x tile.
  __device__ uint32_t weight(bool resident, int slot, int s) const {
    return weights + (resident ? slot : 2 * s) * kGroupTileBytes;
  }
  __device__ uint32_t full(int s) const { return barriers + s * 8; }
  __device__ uint32_t empty(int s) const { return barriers + (kMaxGroupStages + s) * 8; }
  __device__ uint32_t weights_free() const { return barriers + 2 * kMaxGroupStages * 8; }
};

// A unit of work (schedule.h) with its group's rows and steps; its token tiles are those from
// `first` in steps of `lanes`, below `end`.
struct Unit {
  int first, end, lanes, rows[2], num_steps;
  int register_steps;  // the last ones
  bool resident;
  const int4* steps;

  __device__ Unit(const GroupArgs& args, int index) {
    const int4* words = reinterpret_cast<const int4*>(args.plan + args.units_offset) + 2 * index;
    const int4 u = __ldg(words), stretch = __ldg(words + 1);
    const int4 g =
        __ldg(reinterpret_cast<const int4*>(args.plan + args.section.groups_offset) + u.x);
    const auto bound = [&](int part) {
      return static_cast<int>(int64_t{args.token_tiles} * part / stretch.z);
    };
    first = bound(stretch.x) + u.y;
    end = bound(stretch.y);
    lanes = u.z;
    resident = u.w != kGroupStreams;
    rows[0] = g.x;
    rows[1] = g.y;
    steps = reinterpret_cast<const int4*>(args.plan + args.section.steps_offset) + g.z;
    num_steps = g.w - g.z;
    register_steps = resident ? args.section.register_steps : 0;
  }
  // x: x tile, y and z: weight tiles or -1, w: slot.
  __device__ int4 step(int s) const { return s < num_steps ? __ldg(steps + s) : int4{}; }
  // Those whose weights are in shared memory.
  __device__ int shared_steps() const { return num_steps - register_steps; }
  __device__ int outputs() const { return rows[1] >= 0 ? 2 : 1; }
};

// Which rows the steps from `first` on (a multiple of 32) multiply: a bit for each of 32 steps.
struct StepUses {
  uint32_t row0, row1;

  __device__ StepUses(const Unit& unit, int first) {
    const int s = first + threadIdx.x % 32;
    const int4 step = unit.step(s);
    row0 = __ballot_sync(0xffffffffu, s < unit.num_steps && step.y >= 0);
    row1 = __ballot_sync(0xffffffffu, s < unit.num_steps && step.z >= 0);
  }
};

}  // namespace groups

}  // namespace pixelfly
