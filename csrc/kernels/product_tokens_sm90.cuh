// y = act(x · Bᵀ + (x · vᵀ) · uᵀ + bias) + residual, token-stationary, Hopper (sm_90a).
//
// A thread block keeps all of x for 64 tokens in shared memory and streams every weight past it, so
// x comes from HBM once even though the low-rank term needs it twice (t = x vᵀ, then t uᵀ). All
// thread blocks walk the weights in the same order, which L2 serves at about twice the rate of
// distinct data. Any layout balances: every thread block does all output tiles.
//
//   shared memory: x tiles [num_x_tiles][64 tokens][64], t tile [64][64], and one ring of 8 KB
//   weight tiles per consumer warpgroup; every tile in the 128-byte swizzle. The slot of a row's
//   last weight tile becomes the staging tile of the row's epilogue before it goes back to the
//   ring.
//
//   roles: consumer warpgroups 0 .. W-1, each with its own list of output tiles (TokenStep);
//          the last warpgroup produces: warp w feeds ring w, warp 3 loads x.
//   x_full[j]:  producer -> consumers, x tile j has landed      x_empty[j]: its users -> producer
//   w_full/w_empty[w][s]: the same for slot s of ring w
//   the same pair for the t tile, which warpgroup 0 forms and everyone reads
//
// The weight tile is wgmma's A (M = 64 output features), tokens are N: the accumulator holds yᵀ,
// bias is two values a thread, and stmatrix.trans turns it into rows of tokens for one TMA store.
// dx is the same kernel with transposed (MN-major) A over the transposed schedule.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstddef>

#include "device/convert.cuh"
#include "device/epilogue_math.cuh"
#include "device/ldmatrix.cuh"
#include "device/mbarrier.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"
#include "pixelfly/params.h"

namespace pixelfly {

struct TokenMaps {
  CUtensorMap x;           // [T, in], box 64 x 64
  CUtensorMap blocks;      // [nnz * b, b], box 64 x 64
  CUtensorMap factor_in;   // v [r, K] (transposed: u [N, r]), box 64 x 64
  CUtensorMap factor_out;  // u [N, r] (transposed: v [r, K]), box 64 x 64
  CUtensorMap t;           // [T, r], box 64 x 64
  CUtensorMap y;           // [T, out], box 64 x 64
  CUtensorMap preact;      // [T, out]
  CUtensorMap aux;         // residual or z, [T, out]
};

struct TokenArgs {
  TokenSection section;
  const int32_t* plan;
  const void* bias;
  int32_t token_tiles;
  int32_t out_features;
  int32_t stages[kTokenWarpgroups];  // ring slots of each warpgroup
  Activation activation;
  bool has_rank;
  bool has_preact;
  bool has_residual;
  bool has_z;  // multiply by activation'(z) instead of applying the activation
};

constexpr int kTokenTileBytes = kTokenTile * kTokenTile * 2;
constexpr int kTokenThreads = 128 * (kTokenWarpgroups + 1);
constexpr int kMaxXTiles = 20;
constexpr int kMaxTokenStages = 8;

// What a ring slot holds: the producer writes it before the weight tile is announced, so consumers
// never read the plan from global memory.
struct TokenSlot {
  int32_t x_tile;
  int32_t flags;
};

struct TokenShared {
  uint64_t x_full[kMaxXTiles + 1], x_empty[kMaxXTiles + 1];  // the last one is the t tile's
  uint64_t w_full[kTokenWarpgroups][kMaxTokenStages];
  uint64_t w_empty[kTokenWarpgroups][kMaxTokenStages];
  uint64_t aux_full[kTokenWarpgroups];
  TokenSlot slots[kTokenWarpgroups][kMaxTokenStages];
};

namespace tokens {

// Shared-memory addresses of the bookkeeping, from one opaque base: the compiler would otherwise
// recompute the base, a slow special-register read, at every use.
struct Addresses {
  uint32_t base;
  __device__ explicit Addresses(TokenShared& shared) {
    asm volatile("mov.u32 %0, %1;" : "=r"(base) : "r"(device::smem_address(&shared)));
  }
  __device__ uint32_t x_full(int x) const { return base + offsetof(TokenShared, x_full) + x * 8; }
  __device__ uint32_t x_empty(int x) const { return base + offsetof(TokenShared, x_empty) + x * 8; }
  __device__ uint32_t w_full(int w, int s) const {
    return base + offsetof(TokenShared, w_full) + (w * kMaxTokenStages + s) * 8;
  }
  __device__ uint32_t w_empty(int w, int s) const {
    return base + offsetof(TokenShared, w_empty) + (w * kMaxTokenStages + s) * 8;
  }
  __device__ uint32_t aux_full(int w) const {
    return base + offsetof(TokenShared, aux_full) + w * 8;
  }
  __device__ uint32_t slot(int w, int s) const {
    return base + offsetof(TokenShared, slots) + (w * kMaxTokenStages + s) * 8;
  }
};

// Walks a ring: slot index and the parity of the phase that the next use of the slot completes.
struct Ring {
  int stages;
  int slot = 0;
  uint32_t phase = 0;
  __device__ void advance() {
    if (++slot == stages) {
      slot = 0;
      phase ^= 1;
    }
  }
};

// A whole warp: each lane fetches one step of the next 32, then lane 0 issues them one by one.
__device__ inline void produce_weights(const TokenMaps& maps, const TokenArgs& args, int ring_index,
                                       uint32_t ring_base, Addresses at) {
  int first = args.section.steps_offset;
  for (int w = 0; w < ring_index; ++w) first += 4 * args.section.num_steps[w];
  const int4* steps = reinterpret_cast<const int4*>(args.plan + first);
  const int count = args.section.num_steps[ring_index];
  if (count == 0) return;
  const int lane = threadIdx.x % 32;
  Ring ring{args.stages[ring_index]};
  int4 ahead = __ldg(steps + min(lane, count - 1));
  for (int tile = blockIdx.x; tile < args.token_tiles; tile += gridDim.x) {
    for (int begin = 0; begin < count; begin += 32) {
      const int4 mine = ahead;
      const int next = begin + 32 < count ? begin + 32 : 0;
      ahead = __ldg(steps + min(next + lane, count - 1));
      for (int i = 0; i < min(32, count - begin); ++i) {
        const int x_tile = __shfl_sync(0xffffffffu, mine.x, i);
        const int w_col = __shfl_sync(0xffffffffu, mine.y, i);
        const int w_row = __shfl_sync(0xffffffffu, mine.z, i);
        const int flags = __shfl_sync(0xffffffffu, mine.w, i);
        if (lane == 0) {
          const uint32_t full = at.w_full(ring_index, ring.slot);
          device::mbarrier_wait(at.w_empty(ring_index, ring.slot), ring.phase ^ 1);
          device::store_shared_int2(at.slot(ring_index, ring.slot), x_tile, flags);
          device::mbarrier_expect_tx(full, kTokenTileBytes);
          const CUtensorMap* map = (flags & kTokenFactorIn)    ? &maps.factor_in
                                   : (flags & kTokenFactorOut) ? &maps.factor_out
                                                               : &maps.blocks;
          device::tma_load_2d(ring_base + ring.slot * kTokenTileBytes, map, full, w_col, w_row);
        }
        ring.advance();
        __syncwarp();
      }
    }
  }
}

__device__ inline void produce_x(const TokenMaps& maps, const TokenArgs& args, uint32_t x_base,
                                 Addresses at) {
  const int2* loads = reinterpret_cast<const int2*>(args.plan + args.section.loads_offset);
  uint32_t phase = 0;
  for (int tile = blockIdx.x; tile < args.token_tiles; tile += gridDim.x, phase ^= 1) {
    for (int i = 0; i < args.section.num_loads; ++i) {
      const int x = __ldg(loads + i).x;
      device::mbarrier_wait(at.x_empty(x), phase ^ 1);
      device::mbarrier_expect_tx(at.x_full(x), kTokenTileBytes);
      device::tma_load_2d(x_base + x * kTokenTileBytes, &maps.x, at.x_full(x), x * kTokenTile,
                          tile * kTokenTile);
    }
  }
}

// Address in a swizzled [64 tokens][64 features] tile of the 8x8 matrix row that this lane serves
// in the j-th stmatrix/ldmatrix.x4.trans of a warp's m64n64 accumulator slice.
__device__ inline uint32_t fragment_address(uint32_t tile, int j) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, matrix = lane / 8;
  const int token = j * 16 + (matrix / 2) * 8 + lane % 8;
  const int chunk = warp * 2 + matrix % 2;
  return tile + token * 128 + ((chunk ^ (token & 7)) << 4);
}

template <typename T>
__device__ void store_tile(const float (&acc)[32], uint32_t tile) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint32_t r[4];
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      r[h] = device::pack2<T>(acc[j * 8 + h * 2], acc[j * 8 + h * 2 + 1]);
    }
    device::stmatrix_x4_trans(fragment_address(tile, j), r);
  }
}

// Applies f(acc, aux) with the aux tile ([64 tokens][64 features], swizzled) in fragment order.
template <typename T, typename F>
__device__ void combine_tile(float (&acc)[32], uint32_t tile, F f) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint32_t r[4];
    device::ldmatrix_x4_trans(r, fragment_address(tile, j));
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      const float2 a = device::unpack2<T>(r[h]);
      acc[j * 8 + h * 2] = f(acc[j * 8 + h * 2], a.x);
      acc[j * 8 + h * 2 + 1] = f(acc[j * 8 + h * 2 + 1], a.y);
    }
  }
}

// One consumer warpgroup. `bar` is its named barrier; `leader` its one thread that talks to TMA.
template <typename T, bool kTransposed>
struct Consumer {
  const TokenMaps& maps;
  const TokenArgs& args;
  Addresses at;
  int warpgroup;
  uint32_t x_base, t_tile, ring_base;
  bool leader;
  uint32_t aux_phase = 0;
  uint32_t staging = 0;        // the ring slot that the current epilogue writes
  uint32_t staging_empty = 0;  // its barrier, while TMA may still be reading the slot

  __device__ void sync() { device::named_barrier_sync(1 + warpgroup, 128); }

  // Hands the staging tile to TMA once every thread has written it.
  __device__ void store(const CUtensorMap* map, uint32_t tile, int feature, int token) {
    device::fence_proxy_async();
    sync();
    if (leader) {
      device::tma_store_2d(map, tile, feature, token);
      device::tma_store_commit();
    }
  }
  // The leader's earlier stores have been read out of shared memory, and everyone knows.
  __device__ void drain() {
    if (leader) device::tma_store_wait_read<0>();
    sync();
  }

  // Gives the last epilogue's slot back to the ring.
  __device__ void release_staging() {
    if (staging_empty == 0) return;
    if (leader) {
      device::tma_store_wait_read<0>();
      device::mbarrier_arrive(staging_empty, 4);
    }
    staging_empty = 0;
  }

  __device__ void load_aux(int feature, int token) {
    drain();
    const uint32_t bar = at.aux_full(warpgroup);
    if (leader) {
      device::mbarrier_expect_tx(bar, kTokenTileBytes);
      device::tma_load_2d(staging, &maps.aux, bar, feature, token);
    }
    device::mbarrier_wait(bar, aux_phase);
    aux_phase ^= 1;
  }

  __device__ void epilogue(float (&acc)[32], int out_tile, int token) {
    const int feature = out_tile * kTokenTile;
    if (args.has_preact) {
      store_tile<T>(acc, staging);
      store(&maps.preact, staging, feature, token);
      drain();
    }
    if (args.has_z) {
      load_aux(feature, token);
      device::dispatch_activation(args.activation, [&](auto tag) {
        combine_tile<T>(acc, staging, [](float a, float z) {
          return a * device::derivative<decltype(tag)::value, false>(z);
        });
      });
    } else {
      device::dispatch_activation(args.activation, [&](auto tag) {
#pragma unroll
        for (float& a : acc) a = device::activate<decltype(tag)::value, false>(a);
      });
    }
    if (args.has_residual) {
      load_aux(feature, token);
      combine_tile<T>(acc, staging, [](float a, float b) { return a + b; });
    }
    if (args.has_z || args.has_residual) sync();  // everyone has read the auxiliary tile
    store_tile<T>(acc, staging);
    store(&maps.y, staging, feature, token);
  }

  // The finished t goes to shared memory for everyone and to global memory for the backward pass.
  __device__ void publish_t(const float (&acc)[32], int token, uint32_t phase) {
    device::mbarrier_wait(at.x_empty(args.section.num_x_tiles), phase ^ 1);
    store_tile<T>(acc, t_tile);
    store(&maps.t, t_tile, 0, token);
    device::mbarrier_arrive(at.x_full(args.section.num_x_tiles));
  }

  // The bias of this thread's two output features, requested when a row begins and converted when
  // it ends, so that its latency hides behind the row's products.
  __device__ void load_bias(int flags, T (&bias)[2]) const {
    if (args.bias == nullptr || (flags & kTokenFactorIn)) return;
    const int m =
        (flags >> kTokenRowShift) * kTokenTile + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    const T* values = static_cast<const T*>(args.bias);
    if (m < args.out_features) bias[0] = values[m];
    if (m + 8 < args.out_features) bias[1] = values[m + 8];
  }

  // acc (+)= weight tile · x tile, asynchronously. Descriptors count 16-byte units; a k16 step is
  // 32 bytes along a K-major row, or 16 rows of 128 bytes of an MN-major tile.
  __device__ void multiply(float (&acc)[32], uint32_t weight, uint32_t x, bool accumulate) {
    const uint64_t a =
        kTransposed ? device::descriptor_mn_major(weight, 0) : device::descriptor_k_major(weight);
    const uint64_t b = device::descriptor_k_major(x);
    constexpr int kStepA = kTransposed ? 128 : 2;
    device::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      device::wgmma<T, kTransposed, false>(acc, a + k * kStepA, b + k * 2, accumulate || k > 0);
    }
    device::wgmma_commit();
  }

  __device__ void run() {
    const int count = args.section.num_steps[warpgroup];
    if (count == 0) return;
    const bool warp_leader = threadIdx.x % 32 == 0;
    Ring ring{args.stages[warpgroup]};
    uint32_t phase = 0;  // of x and t: one per token tile
    float acc[32];
    for (int tile = blockIdx.x; tile < args.token_tiles; tile += gridDim.x, phase ^= 1) {
      uint32_t ready = 0;  // x tiles already known to have landed
      for (int done = 0; done < count;) {
        int flags;
        T bias[2] = {T(0.f), T(0.f)};
        bool begin = true;
        do {
          const uint32_t slot = ring_base + ring.slot * kTokenTileBytes;
          const uint32_t slot_empty = at.w_empty(warpgroup, ring.slot);
          device::mbarrier_wait(at.w_full(warpgroup, ring.slot), ring.phase);
          const int2 info = device::load_shared_int2(at.slot(warpgroup, ring.slot));
          ring.advance();
          ++done;
          const int x_tile = info.x;
          flags = info.y;
          if (begin) load_bias(flags, bias);
          if (!(flags & kTokenNoProduct)) {
            if (!(ready >> x_tile & 1)) device::mbarrier_wait(at.x_full(x_tile), phase);
            ready |= 1u << x_tile;
            const uint32_t x = x_base + x_tile * kTokenTileBytes;  // t follows the x tiles
            multiply(acc, slot, x, !begin);
            if (!begin || (flags & kTokenRowEnd)) release_staging();
            device::wgmma_wait<0>();
            if ((flags & kTokenRelease) && warp_leader) device::mbarrier_arrive(at.x_empty(x_tile));
          } else {
            release_staging();
#pragma unroll
            for (float& a : acc) a = 0.f;
          }
          if (flags & kTokenRowEnd) {
            staging = slot;
            staging_empty = slot_empty;
          } else if (warp_leader) {
            device::mbarrier_arrive(slot_empty);
          }
          begin = false;
        } while (!(flags & kTokenRowEnd));
        sync();  // every warp's products have read the slot that the epilogue overwrites
        if (flags & kTokenFactorIn) {
          publish_t(acc, tile * kTokenTile, phase);
        } else {
          const float low = device::to_float(bias[0]), high = device::to_float(bias[1]);
#pragma unroll
          for (int i = 0; i < 32; ++i) acc[i] += i % 4 < 2 ? low : high;
          epilogue(acc, flags >> kTokenRowShift, tile * kTokenTile);
        }
      }
    }
    if (leader) device::tma_store_wait<0>();
  }
};

}  // namespace tokens

template <typename T, bool kTransposed>
__global__ void __launch_bounds__(kTokenThreads, 1)
    product_tokens_sm90(const __grid_constant__ TokenMaps maps,
                        const __grid_constant__ TokenArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t raw[];
  __shared__ TokenShared shared;
  const tokens::Addresses at(shared);
  const uint32_t base = (device::smem_address(raw) + 1023) & ~1023u;
  const int num_tiles = args.section.num_x_tiles;
  const uint32_t t_tile = base + num_tiles * kTokenTileBytes;
  const uint32_t rings = t_tile + (args.has_rank ? kTokenTileBytes : 0);

  if (threadIdx.x == 0) {
    const int2* loads = reinterpret_cast<const int2*>(args.plan + args.section.loads_offset);
    for (int i = 0; i < args.section.num_loads; ++i) {
      const int2 load = __ldg(loads + i);
      device::mbarrier_init(at.x_full(load.x), 1);
      device::mbarrier_init(at.x_empty(load.x), 4 * load.y);
    }
    for (int w = 0; w < kTokenWarpgroups; ++w) {
      for (int s = 0; s < args.stages[w]; ++s) {
        device::mbarrier_init(at.w_full(w, s), 1);
        device::mbarrier_init(at.w_empty(w, s), 4);
      }
      device::mbarrier_init(at.aux_full(w), 1);
    }
    device::mbarrier_init(at.x_full(num_tiles), 128);
    device::mbarrier_init(at.x_empty(num_tiles), max(1, 4 * args.section.t_users));
    device::mbarrier_init_fence();
  }
  __syncthreads();

  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  const int ring_index = warpgroup == kTokenWarpgroups ? threadIdx.x / 32 % 4 : warpgroup;
  uint32_t ring = rings;
  for (int w = 0; w < min(ring_index, kTokenWarpgroups); ++w) {
    ring += args.stages[w] * kTokenTileBytes;
  }
  if (warpgroup < kTokenWarpgroups) {
    tokens::Consumer<T, kTransposed> consumer{maps, args,   at,   warpgroup,
                                              base, t_tile, ring, threadIdx.x % 128 == 0};
    consumer.run();
  } else if (ring_index < kTokenWarpgroups) {
    tokens::produce_weights(maps, args, ring_index, ring, at);
  } else if (ring_index == 3 && threadIdx.x % 32 == 0) {
    tokens::produce_x(maps, args, base, at);
  }
#endif
}

}  // namespace pixelfly
