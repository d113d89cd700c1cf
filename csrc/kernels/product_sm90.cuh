// y = act(x · Bᵀ + t · uᵀ + bias) + residual, and dx = (dz · B + s · v) ⊙ slope; Hopper (sm_90a).
//
// A thread block walks the token tiles of one row group: two output tiles (64 features each) that
// share x tiles. The weight tile is wgmma's A (M = 64 features), 128 tokens are N, so accumulators
// hold yᵀ: the bias is two values a thread, and stmatrix.trans turns 64x64 chunks into rows of
// tokens for TMA stores. dx uses the same stored blocks through transposed (MN-major) A descriptors
// over the transposed schedule.
//
//   shared memory: ones, 128 bytes, for the bias (a wgmma that sanitizers take for one of 4 KB)
//                  ring [stages] of x tiles [128 tokens][64] (16 KB; cooperative: two of them)
//                  staging [2 warpgroups][staging tiles] of [64 tokens][64]
//                  weights: all of the group's, which stay for the whole unit if they fit; else a
//                  ring of each step's (16 KB a stage). All tiles in the 128-byte swizzle.
//
//   registers: where weights stay, those of the last steps, as wgmma's A: of one or two steps of a
//              pair, or (kAlone) of eight of a single row, whose sums are half as many. They come
//              through the ring at a unit's start. What this leaves of shared memory is for x:
//              more of it under way is what most products are short of.
//
//   roles: warpgroups 0 and 1 consume, both rows of 128 tokens each: 2 x m64n128, 128 accumulators
//          a thread. One thread of warpgroup 2 loads.
//          Ping-pong: they take alternate token tiles; one multiplies while the other runs its
//          epilogue. Cooperative: they take two token tiles together, for which streamed weights
//          are read once.
//   full[s]:   producer -> the consumers of stage s: it has landed
//   empty[s]:  their warps -> producer
//   turn w:    named barrier (ping-pong); the other warpgroup has issued all its products, so w may
//              wait on the ring. Nobody waits on a stage outside its turn: parities would alias.
//   weights_free: consumers -> producer, the unit is done and its weights may be replaced
//
// A dependent launch: before it waits for the kernel before it, it reads nothing but the plan.
// The sums start as the bias: one product of its values, in registers, with a tile of ones.
// (Setting 128 registers a thread takes longer: straight-line code was seen to run at about six
// cycles an instruction here.) For the same reason the calls that only round and store (kPlain)
// have kernels of their own.
//
// With a residual or slope, its tiles follow the steps of a token tile through the same ring, and
// the outputs replace them there. bf16's slopes are codes of a byte (device/slope_code.cuh): a tile
// of them takes half a stage, the half where the later outputs will go. Other outputs go through
// the staging tiles; cooperative warpgroups also use their half of the last step's stage.
//
// t may be formed at the same time, by low_rank_ahead_sm90: then the producer waits for a flag
// before it loads a tile of t, the last of a token tile's steps.
//
// Where x is three matrices side by side (kThirds), the producer chooses among their maps: some ten
// instructions a step, from which kernels of their own keep the other calls.
//
// Where tokens are columns (kColumns), tiles of activations are [64 features][64 tokens]: x is
// wgmma's B through MN-major descriptors, and outputs need no transposition.
//
// Thread blocks load the same x tiles at the same step where the planner finds an order for it
// (row_groups.cpp): L2 serves such loads at about twice the rate of distinct ones.
#pragma once

#include "device/convert.cuh"
#include "device/dependent_launch.cuh"
#include "device/elect.cuh"
#include "device/mbarrier.cuh"
#include "device/register_budget.cuh"
#include "device/shared_memory.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"
#include "kernels/product_sm90_epilogue.cuh"
#include "kernels/product_sm90_fragments.cuh"
#include "kernels/product_sm90_produce.cuh"
#include "kernels/product_sm90_work.cuh"

namespace pixelfly {

namespace groups {

// One consumer warpgroup.
template <typename T, bool kTransposed, bool kQuads, bool kCooperative, bool kPlain, bool kColumns,
          bool kAlone>
struct Consumer : Epilogue<T, kTransposed, kCooperative, kPlain, kColumns> {
  using Base = Epilogue<T, kTransposed, kCooperative, kPlain, kColumns>;
  using Base::args, Base::epilogue, Base::has_aux, Base::held, Base::layout, Base::leader,
      Base::release, Base::sample, Base::warpgroup, Base::x_tile;

  // Weight tiles that stay in registers: of the last steps, for each row.
  using Weights = WeightFragments<T, kTransposed, kColumns>;
  static constexpr bool kInRegisters = !kQuads && !kCooperative;
  static constexpr int kRegisterSteps = kAlone ? kAloneRegisterSteps : kPairRegisterSteps;
  static constexpr int kRows = kAlone ? 1 : 2;

  // acc += weight tile · x tile, asynchronously. Descriptors count 16-byte units; a k16 step is
  // 32 bytes along a K-major row, or 16 rows of 128 bytes of an MN-major tile.
  __device__ __forceinline__ void multiply(float (&acc)[64], uint32_t weight, uint32_t x) const {
    const uint64_t a = kQuads        ? device::descriptor_quads(weight, kTransposed)
                       : kTransposed ? device::descriptor_mn_major(weight, 0)
                                     : device::descriptor_k_major(weight);
    const uint64_t b = x_descriptor<kColumns>(x);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int step = kQuads ? device::quads_step(k, kTransposed) : k * (kTransposed ? 128 : 2);
      device::wgmma<T, kTransposed, kColumns>(acc, a + step, b + k * (kColumns ? 128 : 2), 1);
    }
  }

  // The weights of the last steps, from stages that the second warpgroup leaves for both.
  __device__ __forceinline__ void load_weights(Weights (&weights)[kRegisterSteps][kRows], int steps,
                                               Ring& ring) const {
    constexpr int kStepsOfStage = 2 / kRows;
#pragma unroll
    for (int i = 0; i < kRegisterSteps; i += kStepsOfStage) {
      if (!kAlone && i >= steps) break;
      const uint32_t tiles = layout.stage(ring.stage);
      device::mbarrier_wait(layout.full(ring.stage), ring.phase);
      weights[i][0].load(tiles);
      weights[i + kStepsOfStage - 1][kRows - 1].load(tiles + kGroupTileBytes);
      ring.advance();
    }
    if (warpgroup == 0) {
      device::named_barrier_arrive(6, 256);
      return;
    }
    device::named_barrier_sync(6, 256);
    for (int i = steps / kStepsOfStage; i > 0; --i) release(ring.before(i));
  }

  // The bias of a tile as wgmma's A: in the first of 16 columns, whose others are zero.
  __device__ void load_bias(uint32_t (&bias)[4], int row) const {
    const T* values = static_cast<const T*>(args.bias);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int feature =
          row * kGroupTile + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + i * 8;
      const bool used = i < 2 && threadIdx.x % 4 == 0 && values != nullptr && row >= 0 &&
                        feature < args.out_features;
      bias[i] = used ? device::pack2<T>(device::to_float(values[feature]), 0.f) : 0;
    }
  }

  // Leaves a token tile's stages to the other warpgroup.
  __device__ void pass(Ring& ring, int stages) const {
    if constexpr (kCooperative) {
      for (int s = 0; s < stages; ++s) {
        device::mbarrier_wait(layout.full(ring.stage), ring.phase);
        release(ring.stage);
        ring.advance();
      }
    } else {
      ring.skip(stages);
    }
  }

  __device__ void run() {
    const int other = warpgroup ^ 1;
    Ring ring{layout.stages};
    int turn = 0;
    float acc0[64], acc1[64];
    const uint64_t ones = device::descriptor_repeated(layout.ones);
    if (warpgroup == 1 && !kCooperative) device::named_barrier_arrive(2, 256);
    for (int index = blockIdx.x; index < args.num_units; index += gridDim.x) {
      const Unit unit(args, index);
      if (unit.first >= unit.end) continue;
      const int aux_stages = has_aux() ? unit.outputs() : 0;
      const StepUses first_uses(unit, 0);
      uint32_t bias0[4], bias1[4];
      if (args.ready == nullptr) device::wait_for_previous_kernel();
      load_bias(bias0, unit.rows[0]);
      load_bias(bias1, unit.rows[1]);
      Weights weights[kRegisterSteps][kRows];
      if (kInRegisters && unit.register_steps > 0) {
        load_weights(weights, unit.register_steps, ring);
      }
      for (int begin = unit.first; begin < unit.end;
           begin += kCooperative ? 2 * unit.lanes : unit.lanes, turn ^= 1) {
        const int tile = begin + (kCooperative ? warpgroup * unit.lanes : 0);
        if (kCooperative ? tile >= unit.end : turn != warpgroup) {
          pass(ring, unit.num_steps + aux_stages);
          continue;
        }
        StepUses uses = first_uses;
        uint32_t slot = layout.weights;
        int previous = -1;
        if (!kCooperative) device::named_barrier_sync(2 + warpgroup, 256);
        device::wgmma_fence();
        device::wgmma_registers<T, false>(acc0, bias0, ones, 0);
        if constexpr (!kAlone) device::wgmma_registers<T, false>(acc1, bias1, ones, 0);
        device::wgmma_commit();
        const auto next_step = [&] {
          if (previous >= 0) release(previous);
          previous = ring.stage;
          ring.advance();
        };
        for (int s = 0; s < unit.shared_steps(); ++s) {
          if (s > 0 && s % 32 == 0) uses = StepUses(unit, s);
          const bool use0 = uses.row0 >> s % 32 & 1, use1 = uses.row1 >> s % 32 & 1;
          const uint32_t x = x_tile(ring.stage);
          const uint32_t weight = unit.resident ? slot : layout.weight(false, 0, ring.stage);
          slot += (use0 + use1) * kGroupTileBytes;
          device::mbarrier_wait(layout.full(ring.stage), ring.phase);
          // Each case commits and waits by itself: across a join of branches the compiler commits
          // every case on its own and the shared wait then drains the step that was just issued.
          if (kAlone || !use1) {
            device::wgmma_fence();
            multiply(acc0, weight, x);
            device::wgmma_commit();
            device::wgmma_wait<1>();
          } else if (!use0) {
            device::wgmma_fence();
            multiply(acc1, weight, x);
            device::wgmma_commit();
            device::wgmma_wait<1>();
          } else {
            device::wgmma_fence();
            multiply(acc0, weight, x);
            multiply(acc1, weight + kGroupTileBytes, x);
            device::wgmma_commit();
            device::wgmma_wait<1>();
          }
          next_step();
        }
        if (kInRegisters && unit.register_steps > 0) {
#pragma unroll
          for (int i = 0; i < kRegisterSteps; ++i) {
            if (!kAlone && i >= unit.register_steps) break;
            const uint32_t x = x_tile(ring.stage);
            device::mbarrier_wait(layout.full(ring.stage), ring.phase);
            if (kAlone || unit.rows[1] < 0) {
              device::wgmma_fence();
              weights[i][0].multiply(acc0, x);
              device::wgmma_commit();
              device::wgmma_wait<1>();
            } else {
              device::wgmma_fence();
              weights[i][0].multiply(acc0, x);
              weights[i][kRows - 1].multiply(acc1, x);
              device::wgmma_commit();
              device::wgmma_wait<1>();
            }
            next_step();
          }
        }
        for (int r = 0; r < aux_stages; ++r) {
          device::mbarrier_wait(layout.full(ring.stage), ring.phase);
          ring.advance();
        }
        if (!kCooperative) device::named_barrier_arrive(2 + other, 256);
        device::wgmma_wait<0>();
        held = kCooperative && !has_aux() ? previous : -1;
        if (previous >= 0 && held < 0) release(previous);

        if constexpr (kColumns) sample = tile / args.column_tiles;
        const int first = kColumns ? sample * args.column_tiles : 0;
        const int token = (tile - first) * kGroupTokens;
        epilogue(acc0, unit.rows[0], token, x_tile(ring.before(aux_stages)));
        if (!kAlone && unit.rows[1] >= 0) {
          epilogue(acc1, unit.rows[1], token, x_tile(ring.before(1)));
        }
        // The next token tile may use the staging tiles in another order: leave none being read.
        if ((aux_stages > 0 || kCooperative) && leader()) {  // for its four warps
          device::tma_store_wait_read<0>();
          if (held >= 0) device::mbarrier_arrive(layout.empty(held), 4);
          for (int i = aux_stages; i > 0; --i) {
            device::mbarrier_arrive(layout.empty(ring.before(i)), 4);
          }
        }
      }
      if (args.section.resident_weights > 0 && index + gridDim.x < args.num_units) {
        device::named_barrier_sync(1, 256);
        if (threadIdx.x == 0) device::mbarrier_arrive(layout.weights_free());
      }
    }
    if (leader()) device::tma_store_wait<0>();
  }
};

}  // namespace groups

template <typename T, bool kTransposed, bool kQuads, bool kCooperative, bool kPlain,
          bool kColumns = false, bool kThirds = false, bool kAlone = false>
__global__ void __launch_bounds__(kGroupThreads, 1)
    product_sm90(const __grid_constant__ GroupMaps maps, const __grid_constant__ GroupArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ GroupShared shared;
  const groups::Layout layout(device::smem_address(device::dynamic_shared()), args,
                              device::smem_address(&shared), kCooperative);
  if (threadIdx.x == 0) {
    for (int s = 0; s < layout.stages; ++s) {
      device::mbarrier_init(layout.full(s), 1);
      device::mbarrier_init(layout.empty(s), kCooperative ? 8 : 4);
    }
    device::mbarrier_init(layout.weights_free(), 1);
    device::mbarrier_init_fence();
  }
  if (threadIdx.x < kGroupOnesBytes / 4) {
    device::store_shared(layout.ones + threadIdx.x * 4, device::pack2<T>(1.f, 1.f));
    device::fence_proxy_async();
  }
  __syncthreads();
  if (args.early_start) device::allow_dependent_launch();

  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (warpgroup == 2) {
    device::release_registers<40>();
    if (threadIdx.x < 288 && device::elect_one()) {
      groups::Producer<kTransposed, kQuads, kCooperative, kColumns, kThirds, kAlone>{maps, args,
                                                                                     layout}
          .run();
    }
  } else {
    device::claim_registers<232>();
    groups::Consumer<T, kTransposed, kQuads, kCooperative, kPlain, kColumns, kAlone>{
        {maps, args, layout, warpgroup}}
        .run();
  }
#endif
}

}  // namespace pixelfly
