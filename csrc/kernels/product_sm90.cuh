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

#include "device/activation_codes.cuh"
#include "device/convert.cuh"
#include "device/dependent_launch.cuh"
#include "device/ldmatrix.cuh"
#include "device/mbarrier.cuh"
#include "device/register_budget.cuh"
#include "device/shared_memory.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"
#include "kernels/product_sm90_columns.cuh"
#include "kernels/product_sm90_produce.cuh"
#include "kernels/product_sm90_rows.cuh"
#include "kernels/product_sm90_slope.cuh"
#include "kernels/product_sm90_work.cuh"

namespace pixelfly {

namespace groups {

// One consumer warpgroup.
template <typename T, bool kTransposed, bool kQuads, bool kCooperative, bool kPlain, bool kColumns>
struct Consumer {
  static constexpr bool kCodes = device::kSlopeCodes<T>;
  using Words = uint32_t[4][4];                    // 64 tokens x 64 features, packed in pairs
  using SlopeWords = uint32_t[kCodes ? 2 : 4][4];  // the same of slopes

  const GroupMaps& maps;
  const GroupArgs& args;
  const Layout& layout;
  int warpgroup;
  int next_staging = 0;
  int held = -1;    // the stage that cooperative warpgroups use for outputs
  int sample = -1;  // of the token tile, where tokens are columns

  __device__ bool has_aux() const { return !kPlain && args.has_aux(); }
  __device__ bool leader() const { return threadIdx.x % 128 == 0; }
  __device__ void release(int stage) const {
    if (threadIdx.x % 32 == 0) device::mbarrier_arrive(layout.empty(stage));
  }
  __device__ void synchronize() const { device::named_barrier_sync(4 + warpgroup, 128); }
  // This warpgroup's 128 tokens of a stage.
  __device__ uint32_t x_tile(int stage) const {
    return layout.stage(stage) + (kCooperative ? warpgroup * kGroupXBytes : 0);
  }

  // A staging tile that may be overwritten.
  __device__ __forceinline__ uint32_t free_staging() {
    const int next = next_staging++;
    const uint32_t tiles = layout.staging + warpgroup * layout.staging_tiles * kGroupTileBytes;
    uint32_t at;
    if (kCooperative && held >= 0) {
      if (leader()) device::tma_store_wait_read<3>();
      at = (next % 4 < 2 ? x_tile(held) : tiles) + next % 2 * kGroupTileBytes;
    } else if (layout.staging_tiles == 2) {
      if (leader()) device::tma_store_wait_read<1>();
      at = tiles + next % 2 * kGroupTileBytes;
    } else {
      if (leader()) device::tma_store_wait_read<0>();
      at = tiles;
    }
    synchronize();
    return at;
  }

  __device__ __forceinline__ static void pack(Words& pairs, const float* chunk) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      pairs[i / 4][i % 4] = device::pack2<T>(chunk[2 * i], chunk[2 * i + 1]);
    }
  }

  // Writes 64 tokens x 64 features, 16-bit values or codes, into a tile in shared memory.
  template <int kWords>
  __device__ __forceinline__ void fill(const uint32_t (&words)[kWords][4], uint32_t tile) const {
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      if constexpr (kColumns) {
        device::stmatrix_x4(
            kWords == 4 ? columns::fragment_address(tile, j) : columns::code_address(tile, j),
            words[j]);
      } else {
        const uint32_t at = kWords == 4 ? fragment_address(tile, j) : code_address(tile, j);
        device::stmatrix_x4_trans(at, words[j]);
      }
    }
  }

  // One thread.
  __device__ __forceinline__ void send(const CUtensorMap* map, uint32_t tile, int feature,
                                       int token) const {
    if constexpr (kColumns) {
      device::tma_store_3d(map, tile, token, feature, sample);
    } else {
      device::tma_store_2d(map, tile, feature, token);
    }
  }

  // Sends them to global memory by way of that tile.
  template <int kWords>
  __device__ __forceinline__ void store(const uint32_t (&words)[kWords][4], uint32_t tile,
                                        const CUtensorMap* map, int feature, int token) const {
    fill(words, tile);
    device::fence_proxy_async();
    synchronize();
    if (leader()) {
      send(map, tile, feature, token);
      device::tma_store_commit();
    }
  }

  // Sends two of them through both staging tiles, with one wait and one barrier.
  template <int kWords>
  __device__ __forceinline__ void store_both(const uint32_t (&first)[kWords][4],
                                             const CUtensorMap* first_map, int first_token,
                                             const Words& second, int second_token,
                                             int feature) const {
    const uint32_t tile = layout.staging + warpgroup * 2 * kGroupTileBytes;
    if (leader()) device::tma_store_wait_read<0>();
    synchronize();
    fill(first, tile);
    fill(second, tile + kGroupTileBytes);
    device::fence_proxy_async();
    synchronize();
    if (leader()) {
      send(first_map, tile, feature, first_token);
      send(&maps.y, tile + kGroupTileBytes, feature, second_token);
      device::tma_store_commit();
    }
  }

  // 128 tokens of one output tile. `aux`: its residual or slope tile, which it replaces.
  __device__ __forceinline__ void epilogue(float (&acc)[64], int row, int token, uint32_t aux) {
    const int feature = row * kGroupTile;
    if (kPlain && !kCooperative && layout.staging_tiles == 2) {
      Words low, high;
      pack(low, acc);
      pack(high, acc + 32);
      store_both(low, &maps.y, token, high, token + 64, feature);
      return;
    }
    uint32_t codes[2][2][4];  // of both halves: read before an output replaces them
    if (kTransposed && kCodes && !kPlain && args.has_slope) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t tile = aux + kGroupTileBytes;
        if constexpr (kColumns) {
          const uint32_t half = tile + i / 2 * columns::kCodeBytes;
          device::ldmatrix_x4(codes[i / 2][i % 2], columns::code_address(half, i % 2));
        } else {
          device::ldmatrix_x4_trans(codes[i / 2][i % 2], code_address(tile, i));
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* chunk = acc + half * 32;
      const int first = token + half * 64;
      const uint32_t aux_half = aux + half * kGroupTileBytes;
      Words pairs;
      if constexpr (kPlain) {
        // Only to round and store.
      } else if constexpr (kTransposed) {
        if (args.has_slope && kCodes) {
          if constexpr (kColumns) {
            columns::combine_codes(chunk, codes[half]);
          } else {
            combine_codes(chunk, codes[half]);
          }
        } else if (args.has_slope) {
          combine<T, kColumns>(chunk, aux_half, [](float a, float b) { return a * b; });
        }
      } else if (args.has_slope_out) {
        SlopeWords slopes;
        device::dispatch_activation(args.activation, [&](auto tag) {
          constexpr Activation kKind = decltype(tag)::value;
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            float* x = chunk + 4 * i;
            if constexpr (kCodes) {
              const uint32_t pairs[2] = {device::activate_with_codes<kKind>(x[0], x[1]),
                                         device::activate_with_codes<kKind>(x[2], x[3])};
              if constexpr (kColumns) {
                columns::add_codes(slopes, i, pairs);
              } else {
                slopes[i / 4][i % 4] = join_codes(pairs);
              }
            } else {
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                const auto p = device::activate_with_slope<kKind, false>(x[2 * e]);
                const auto q = device::activate_with_slope<kKind, false>(x[2 * e + 1]);
                x[2 * e] = p.value;
                x[2 * e + 1] = q.value;
                slopes[i / 2][i % 2 * 2 + e] = device::pack2<T>(p.slope, q.slope);
              }
            }
          }
        });
        if constexpr (kCodes && !kColumns) exchange_codes(slopes);
        if (!kCooperative && layout.staging_tiles == 2 && !has_aux()) {
          pack(pairs, chunk);
          store_both(slopes, &maps.slope_out, first, pairs, first, feature);
          continue;
        }
        store(slopes, free_staging(), &maps.slope_out, feature, first);
      } else if (args.activation != Activation::kNone) {
        device::dispatch_activation(args.activation, [&](auto tag) {
#pragma unroll
          for (int i = 0; i < 32; ++i) {
            chunk[i] = device::activate<decltype(tag)::value, false>(chunk[i]);
          }
        });
      }
      if (!kPlain && args.has_residual) {
        combine<T, kColumns>(chunk, aux_half, [](float a, float b) { return a + b; });
      }
      pack(pairs, chunk);
      store(pairs, has_aux() ? aux_half : free_staging(), &maps.y, feature, first);
    }
  }

  // acc += weight tile · x tile, asynchronously. Descriptors count 16-byte units; a k16 step is
  // 32 bytes along a K-major row, or 16 rows of 128 bytes of an MN-major tile.
  __device__ __forceinline__ void multiply(float (&acc)[64], uint32_t weight, uint32_t x) const {
    const uint64_t a = kQuads        ? device::descriptor_quads(weight, kTransposed)
                       : kTransposed ? device::descriptor_mn_major(weight, 0)
                                     : device::descriptor_k_major(weight);
    const uint64_t b =
        kColumns ? device::descriptor_mn_major(x, kGroupTileBytes) : device::descriptor_k_major(x);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int step = kQuads ? device::quads_step(k, kTransposed) : k * (kTransposed ? 128 : 2);
      device::wgmma<T, kTransposed, kColumns>(acc, a + step, b + k * (kColumns ? 128 : 2), 1);
    }
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
        device::wgmma_registers<T>(acc0, bias0, ones);
        device::wgmma_registers<T>(acc1, bias1, ones);
        device::wgmma_commit();
        for (int s = 0; s < unit.num_steps; ++s) {
          if (s > 0 && s % 32 == 0) uses = StepUses(unit, s);
          const bool use0 = uses.row0 >> s % 32 & 1, use1 = uses.row1 >> s % 32 & 1;
          const uint32_t x = x_tile(ring.stage);
          const uint32_t weight = unit.resident ? slot : layout.weight(false, 0, ring.stage);
          slot += (use0 + use1) * kGroupTileBytes;
          device::mbarrier_wait(layout.full(ring.stage), ring.phase);
          // Each case commits and waits by itself: across a join of branches the compiler commits
          // every case on its own and the shared wait then drains the step that was just issued.
          if (!use1) {
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
          if (previous >= 0) release(previous);
          previous = ring.stage;
          ring.advance();
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
        if (unit.rows[1] >= 0) epilogue(acc1, unit.rows[1], token, x_tile(ring.before(1)));
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
          bool kColumns = false, bool kThirds = false>
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
    if (threadIdx.x == 256) {
      groups::produce<kTransposed, kQuads, kCooperative, kColumns, kThirds>(maps, args, layout);
    }
  } else {
    device::claim_registers<232>();
    groups::Consumer<T, kTransposed, kQuads, kCooperative, kPlain, kColumns>{maps, args, layout,
                                                                             warpgroup}
        .run();
  }
#endif
}

}  // namespace pixelfly
