// product_sm90's producer: one thread that loads the tiles of every step, in the consumers' order.
#pragma once

#include "device/dependent_launch.cuh"
#include "device/flag.cuh"
#include "device/mbarrier.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"
#include "kernels/product_sm90_work.cuh"
#include "kernels/thirds.cuh"

namespace pixelfly {

namespace groups {

template <bool kTransposed, bool kQuads>
__device__ void load_weight(const GroupMaps& maps, const GroupArgs& args, uint32_t at,
                            uint32_t full, int weight, int x_tile, int row) {
  if constexpr (kQuads) {  // absent blocks lie outside the matrix: zeros
    const int4 quad = __ldg(reinterpret_cast<const int4*>(args.plan + args.section.quads_offset) +
                            (x_tile < args.num_x_tiles ? weight : 0));
    const int blocks[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const uint32_t box = at + q * device::kQuadBytes;
      if (x_tile < args.num_x_tiles) {
        device::tma_load_2d(box, &maps.blocks, full, 0, blocks[q] * 32);
        continue;
      }
      const int rank = (x_tile - args.num_x_tiles) * kGroupTile + q / 2 * 32;
      const int out = row * kGroupTile + q % 2 * 32;
      device::tma_load_2d(box, &maps.factor, full, kTransposed ? out : rank,
                          kTransposed ? rank : out);
    }
  } else if (x_tile < args.num_x_tiles) {
    const int col = (weight & ((1 << args.weight_shift) - 1)) * kGroupTile;
    device::tma_load_2d(at, &maps.blocks, full, col, (weight >> args.weight_shift) * kGroupTile);
  } else {
    const int rank = (x_tile - args.num_x_tiles) * kGroupTile, out = row * kGroupTile;
    device::tma_load_2d(at, &maps.factor, full, kTransposed ? out : rank, kTransposed ? rank : out);
  }
}

// The weights of a unit's last steps, which consumers keep in registers: two tiles a stage, of two
// steps of a single row or of a step's two rows.
template <bool kTransposed, bool kQuads, bool kAlone>
__device__ void load_register_weights(const GroupMaps& maps, const GroupArgs& args,
                                      const Layout& layout, const Unit& unit, Ring& ring) {
  for (int s = unit.shared_steps(); s < unit.num_steps; s += kAlone ? 2 : 1) {
    const int4 step = unit.step(s), next = kAlone ? unit.step(s + 1) : step;
    const int weights[2] = {step.y, kAlone ? next.y : step.z};
    const uint32_t at = layout.stage(ring.stage), full = layout.full(ring.stage);
    device::mbarrier_wait(layout.empty(ring.stage), ring.phase ^ 1);
    device::mbarrier_expect_tx(full, ((weights[0] >= 0) + (weights[1] >= 0)) * kGroupTileBytes);
    if (weights[0] >= 0) {
      load_weight<kTransposed, kQuads>(maps, args, at, full, weights[0], step.x, unit.rows[0]);
    }
    if (weights[1] >= 0) {
      load_weight<kTransposed, kQuads>(maps, args, at + kGroupTileBytes, full, weights[1], next.x,
                                       unit.rows[kAlone ? 0 : 1]);
    }
    ring.advance();
  }
}

// One thread.
template <bool kTransposed, bool kQuads, bool kCooperative, bool kColumns, bool kThirds,
          bool kAlone>
__device__ void produce(const GroupMaps& maps, const GroupArgs& args, const Layout& layout) {
  Ring ring{layout.stages};
  uint32_t units_done = 0;
  bool may_read = args.ready != nullptr;  // what the kernel before this one wrote
  for (int index = blockIdx.x; index < args.num_units; index += gridDim.x) {
    const Unit unit(args, index);
    if (unit.first >= unit.end) continue;
    // Every unit waits once for the one before, even if it loads no weights: whoever skipped a
    // phase could pass the next one too early.
    bool load_weights = true, waited = args.section.resident_weights == 0 || units_done == 0;
    auto wait_for_weights = [&] {
      if (!waited) device::mbarrier_wait(layout.weights_free(), (units_done - 1) & 1);
      waited = true;
    };
    if (unit.register_steps > 0) {
      if (!may_read) device::wait_for_previous_kernel();
      may_read = true;
      load_register_weights<kTransposed, kQuads, kAlone>(maps, args, layout, unit, ring);
    }
    for (int tile = unit.first; tile < unit.end;
         tile += kCooperative ? 2 * unit.lanes : unit.lanes) {
      const int second = tile + unit.lanes;
      const bool both = kCooperative && second < unit.end;
      const int tiles = both ? 2 : 1;
      auto load = [&](const CUtensorMap* map, uint32_t full, int column, int offset) {
        const uint32_t at = layout.stage(ring.stage) + offset;
        if constexpr (kColumns) {  // 64 tokens, then 64 more
          const int sample = tile / args.column_tiles;
          const int token = (tile - sample * args.column_tiles) * kGroupTokens;
          const int half = (kGroupXBytes - offset) / 2;
          device::tma_load_3d(at, map, full, token, column, sample);
          device::tma_load_3d(at + half, map, full, token + 64, column, sample);
          return;
        }
        device::tma_load_2d(at, map, full, column, tile * kGroupTokens);
        if (both) {
          device::tma_load_2d(at + kGroupXBytes, map, full, column, second * kGroupTokens);
        }
      };
      // Asked for early: the answer takes most of a microsecond.
      bool ready = args.ready == nullptr || device::flag_is_up(args.ready + tile);
      bool second_ready = !both || args.ready == nullptr || device::flag_is_up(args.ready + second);
      int4 ahead = unit.step(0);
      if (!may_read) device::wait_for_previous_kernel();
      may_read = true;
      for (int s = 0; s < unit.num_steps; ++s) {
        const int4 step = ahead;
        ahead = unit.step(s + 1);
        const uint32_t full = layout.full(ring.stage);
        device::mbarrier_wait(layout.empty(ring.stage), ring.phase ^ 1);
        const bool loads_weights = load_weights && s < unit.shared_steps();
        const int weights = loads_weights ? (step.y >= 0) + (step.z >= 0) : 0;
        device::mbarrier_expect_tx(full, tiles * kGroupXBytes + weights * kGroupTileBytes);
        const bool is_t = step.x >= args.num_x_tiles;
        if (is_t && args.ready != nullptr) {
          device::wait_for_flag(args.ready + tile, ready);
          if (both) device::wait_for_flag(args.ready + second, second_ready);
        }
        const CUtensorMap* map = is_t ? &maps.t : &maps.x;
        int x_tile = is_t ? step.x - args.num_x_tiles : step.x;
        if constexpr (kThirds) {
          const TilePlace x = place_of_tile(step.x, args.third_tiles);
          if (x.matrix > 0 && !is_t) {
            map = &maps.x_others[x.matrix - 1];
            x_tile = x.tile;
          }
        }
        load(map, full, x_tile * kGroupTile, 0);
        if (loads_weights) {
          wait_for_weights();
          uint32_t at = layout.weight(unit.resident, step.w, ring.stage);
          if (step.y >= 0) {
            load_weight<kTransposed, kQuads>(maps, args, at, full, step.y, step.x, unit.rows[0]);
            at += kGroupTileBytes;
          }
          if (step.z >= 0) {
            load_weight<kTransposed, kQuads>(maps, args, at, full, step.z, step.x, unit.rows[1]);
          }
        }
        ring.advance();
      }
      load_weights = !unit.resident;
      if (args.has_aux()) {
        for (int r = 0; r < unit.outputs(); ++r) {
          const uint32_t full = layout.full(ring.stage);
          device::mbarrier_wait(layout.empty(ring.stage), ring.phase ^ 1);
          device::mbarrier_expect_tx(full, tiles * args.aux_bytes);
          load(&maps.aux, full, (r == 0 ? unit.rows[0] : unit.rows[1]) * kGroupTile,
               kGroupXBytes - args.aux_bytes);
          ring.advance();
        }
      }
    }
    wait_for_weights();
    ++units_done;
  }
  // Whoever waits for this kernel's end may count on the end of the one before.
  if (args.ready != nullptr) device::wait_for_previous_kernel();
}

}  // namespace groups

}  // namespace pixelfly
