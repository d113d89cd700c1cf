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

// A weight tile: of a step of t, from the factor, else from the blocks.
template <bool kTransposed, bool kQuads>
__device__ void load_weight(const GroupMaps& maps, const GroupArgs& args, uint32_t at,
                            uint32_t full, int weight, int x_tile, int row, bool is_t) {
  if constexpr (kQuads) {  // absent blocks lie outside the matrix: zeros
    const int4 quad = __ldg(reinterpret_cast<const int4*>(args.plan + args.section.quads_offset) +
                            (is_t ? 0 : weight));
    const int blocks[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const uint32_t box = at + q * device::kQuadBytes;
      if (!is_t) {
        device::tma_load_2d(box, &maps.blocks, full, 0, blocks[q] * 32);
        continue;
      }
      const int rank = (x_tile - args.num_x_tiles) * kGroupTile + q / 2 * 32;
      const int out = row * kGroupTile + q % 2 * 32;
      device::tma_load_2d(box, &maps.factor, full, kTransposed ? out : rank,
                          kTransposed ? rank : out);
    }
  } else if (!is_t) {
    const int col = (weight & ((1 << args.weight_shift) - 1)) * kGroupTile;
    device::tma_load_2d(at, &maps.blocks, full, col, (weight >> args.weight_shift) * kGroupTile);
  } else {
    const int rank = (x_tile - args.num_x_tiles) * kGroupTile, out = row * kGroupTile;
    device::tma_load_2d(at, &maps.factor, full, kTransposed ? out : rank, kTransposed ? rank : out);
  }
}

// The thread that loads.
template <bool kTransposed, bool kQuads, bool kCooperative, bool kColumns, bool kThirds,
          bool kAlone>
struct Producer {
  const GroupMaps& maps;
  const GroupArgs& args;
  const Layout& layout;
  Ring ring{layout.stages};

  // A token tile or, where warpgroups cooperate, two.
  struct Tokens {
    int tile, second;
    bool both;
    bool ready, second_ready;  // t's flags were seen up

    // Flags are asked for early: the answer takes most of a microsecond.
    __device__ Tokens(const GroupArgs& args, const Unit& unit, int tile)
        : tile(tile),
          second(tile + unit.lanes),
          both(kCooperative && second < unit.end),
          ready(args.ready == nullptr || device::flag_is_up(args.ready + tile)),
          second_ready(!both || args.ready == nullptr || device::flag_is_up(args.ready + second)) {}
    __device__ int count() const { return both ? 2 : 1; }
  };

  // The barrier of the next stage once that is free, for so many bytes.
  __device__ __forceinline__ uint32_t next_stage(int bytes) const {
    const uint32_t full = layout.full(ring.stage);
    device::mbarrier_wait(layout.empty(ring.stage), ring.phase ^ 1);
    device::mbarrier_expect_tx(full, bytes);
    return full;
  }

  __device__ __forceinline__ void load(const CUtensorMap* map, uint32_t full, int column,
                                       const Tokens& tokens, int offset = 0) const {
    const uint32_t at = layout.stage(ring.stage) + offset;
    if constexpr (kColumns) {  // 64 tokens, then 64 more
      const int sample = tokens.tile / args.column_tiles;
      const int token = (tokens.tile - sample * args.column_tiles) * kGroupTokens;
      const int half = (kGroupXBytes - offset) / 2;
      device::tma_load_3d(at, map, full, token, column, sample);
      device::tma_load_3d(at + half, map, full, token + 64, column, sample);
      return;
    }
    device::tma_load_2d(at, map, full, column, tokens.tile * kGroupTokens);
    if (tokens.both) {
      device::tma_load_2d(at + kGroupXBytes, map, full, column, tokens.second * kGroupTokens);
    }
  }
  __device__ __forceinline__ void load_x(uint32_t full, int tile, const Tokens& tokens) const {
    if constexpr (kThirds) {
      const TilePlace x = place_of_tile(tile, args.third_tiles);
      const CUtensorMap* map = x.matrix > 0 ? &maps.x_others[x.matrix - 1] : &maps.x;
      load(map, full, x.tile * kGroupTile, tokens);
    } else {
      load(&maps.x, full, tile * kGroupTile, tokens);
    }
  }
  __device__ __forceinline__ void load_t(uint32_t full, int tile, const Tokens& tokens) const {
    if (args.ready != nullptr) {
      device::wait_for_flag(args.ready + tokens.tile, tokens.ready);
      if (tokens.both) device::wait_for_flag(args.ready + tokens.second, tokens.second_ready);
    }
    load(&maps.t, full, tile * kGroupTile, tokens);
  }

  // The steps of a token tile, of which t's are the last, and the weights that are not in
  // registers. Calls `may_write` before it loads weights.
  template <typename F>
  __device__ __forceinline__ void load_with_weights(const Unit& unit, const Tokens& tokens,
                                                    const F& may_write) {
    const auto load_step = [&](const int4& step, int s, bool is_t) {
      const bool weights[2] = {s < unit.shared_steps() && step.y >= 0,
                               s < unit.shared_steps() && step.z >= 0};
      const uint32_t full =
          next_stage(tokens.count() * kGroupXBytes + (weights[0] + weights[1]) * kGroupTileBytes);
      if (is_t) {
        load_t(full, step.x - args.num_x_tiles, tokens);
      } else {
        load_x(full, step.x, tokens);
      }
      if (weights[0] || weights[1]) may_write();
      uint32_t at = layout.weight(unit.resident, step.w, ring.stage);
      if (weights[0]) {
        load_weight<kTransposed, kQuads>(maps, args, at, full, step.y, step.x, unit.rows[0], is_t);
        at += kGroupTileBytes;
      }
      if (weights[1]) {
        load_weight<kTransposed, kQuads>(maps, args, at, full, step.z, step.x, unit.rows[1], is_t);
      }
      ring.advance();
    };
    const int num_x = unit.num_steps - args.num_t_tiles;
    // Steps that are read together, as the answers take time; one where registers are short.
    constexpr int kAhead = kQuads || kColumns || kThirds ? 1 : 4;
    for (int first = 0; first < num_x; first += kAhead) {
      int4 steps[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) steps[i] = unit.step(first + i);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (first + i < num_x) load_step(steps[i], first + i, false);
      }
    }
    for (int s = num_x; s < unit.num_steps; ++s) load_step(unit.step(s), s, true);
  }

  // The same where all weights are there: a loop of few instructions, as tiles can come no faster
  // than this thread asks for them. Which steps are t's is known by their place alone.
  __device__ __forceinline__ void load_tokens(const Unit& unit, const Tokens& tokens) {
    constexpr int kUnroll = kQuads && kThirds ? 1 : 4;  // one where registers are short
    const int* x_tile = &unit.steps->x;
    int ahead = __ldg(x_tile);
#pragma unroll kUnroll
    for (int s = args.num_t_tiles; s < unit.num_steps; ++s) {
      const int tile = ahead;
      x_tile += sizeof(int4) / sizeof(int);
      ahead = __ldg(x_tile);  // behind a group's last step lies another's, or the units
      load_x(next_stage(tokens.count() * kGroupXBytes), tile, tokens);
      ring.advance();
    }
    for (int tile = 0; tile < args.num_t_tiles; ++tile) {
      load_t(next_stage(tokens.count() * kGroupXBytes), tile, tokens);
      ring.advance();
    }
  }

  // The weights of a unit's last steps, which consumers keep in registers: two tiles a stage, of
  // two steps of a single row or of a step's two rows.
  __device__ void load_register_weights(const Unit& unit) {
    for (int s = unit.shared_steps(); s < unit.num_steps; s += kAlone ? 2 : 1) {
      const int4 step = unit.step(s), next = kAlone ? unit.step(s + 1) : step;
      const int weights[2] = {step.y, kAlone ? next.y : step.z};
      const uint32_t at = layout.stage(ring.stage);
      const uint32_t full = next_stage(((weights[0] >= 0) + (weights[1] >= 0)) * kGroupTileBytes);
      if (weights[0] >= 0) {
        load_weight<kTransposed, kQuads>(maps, args, at, full, weights[0], step.x, unit.rows[0],
                                         step.x >= args.num_x_tiles);
      }
      if (weights[1] >= 0) {
        load_weight<kTransposed, kQuads>(maps, args, at + kGroupTileBytes, full, weights[1], next.x,
                                         unit.rows[kAlone ? 0 : 1], next.x >= args.num_x_tiles);
      }
      ring.advance();
    }
  }

  __device__ void run() {
    uint32_t units_done = 0;
    bool may_read = args.ready != nullptr;  // what the kernel before this one wrote
    const auto wait_for_input = [&] {
      if (!may_read) device::wait_for_previous_kernel();
      may_read = true;
    };
    for (int index = blockIdx.x; index < args.num_units; index += gridDim.x) {
      const Unit unit(args, index);
      if (unit.first >= unit.end) continue;
      // Every unit waits once for the one before, even if it loads no weights: whoever skipped a
      // phase could pass the next one too early.
      bool load_weights = true, waited = args.section.resident_weights == 0 || units_done == 0;
      const auto wait_for_weights = [&] {
        if (!waited) device::mbarrier_wait(layout.weights_free(), (units_done - 1) & 1);
        waited = true;
      };
      if (!kQuads && !kCooperative && unit.register_steps > 0) {
        wait_for_input();
        load_register_weights(unit);
      }
      for (int tile = unit.first; tile < unit.end;
           tile += kCooperative ? 2 * unit.lanes : unit.lanes) {
        const Tokens tokens(args, unit, tile);
        wait_for_input();
        if (load_weights) {
          load_with_weights(unit, tokens, wait_for_weights);
        } else {
          load_tokens(unit, tokens);
        }
        load_weights = !unit.resident;
        for (int r = 0; r < unit.outputs() && args.has_aux(); ++r) {
          const uint32_t full = next_stage(tokens.count() * args.aux_bytes);
          load(&maps.aux, full, (r == 0 ? unit.rows[0] : unit.rows[1]) * kGroupTile, tokens,
               kGroupXBytes - args.aux_bytes);
          ring.advance();
        }
      }
      wait_for_weights();
      ++units_done;
    }
    // Whoever waits for this kernel's end may count on the end of the one before.
    if (args.ready != nullptr) device::wait_for_previous_kernel();
  }
};

}  // namespace groups

}  // namespace pixelfly
