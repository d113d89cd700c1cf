// y = act(x · Bᵀ + (x · vᵀ) · uᵀ + bias) + residual, token-stationary, Hopper (sm_90a).
//
// A thread block keeps all of x for 64 tokens in shared memory and streams every weight past it, so x
// comes from HBM once even though the low-rank term needs it twice (t = x vᵀ, then t uᵀ). All thread
// blocks walk the weights in the same order, which L2 serves at about twice the rate of distinct
// data. Any layout balances: every thread block does all output tiles.
//
//   shared memory: x tiles [num_x_tiles][64 tokens][64], t tile [64][64], one ring of 8 KB weight
//   tiles and one 8 KB staging tile per consumer warpgroup; every tile in the 128-byte swizzle.
//
//   roles: consumer warpgroups 0 .. W-1, each with its own list of output tiles (TokenStep);
//          the last warpgroup produces: warp w feeds ring w, warp 3 loads x.
//   x_full[j]:  producer -> consumers, x tile j has landed      x_empty[j]: its users -> producer
//   w_full/w_empty[w][s]: the same for slot s of ring w
//   t_full: warpgroup 0 (which forms t) -> consumers            t_empty: users of t -> warpgroup 0
//
// The weight tile is wgmma's A (M = 64 output features), tokens are N: the accumulator holds yᵀ, bias
// is two values a thread, and stmatrix.trans turns it into rows of tokens for one TMA store.
// dx is the same kernel with transposed (MN-major) A over the transposed schedule.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "device/epilogue_math.cuh"
#include "device/mbarrier.cuh"
#include "device/stmatrix.cuh"
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
  Activation activation;
  bool has_rank;
  bool has_preact;
  bool has_residual;
  bool has_z;  // multiply by activation'(z) instead of applying the activation
};

constexpr int kTokenTileBytes = kTokenTile * kTokenTile * 2;
constexpr int kTokenThreads = 128 * (kTokenWarpgroups + 1);
constexpr int kMaxXTiles = 20;

struct TokenBarriers {
  uint64_t x_full[kMaxXTiles], x_empty[kMaxXTiles];
  uint64_t w_full[kTokenWarpgroups][8], w_empty[kTokenWarpgroups][8];
  uint64_t aux_full[kTokenWarpgroups];
  uint64_t t_full, t_empty;
};

namespace tokens {

// Walks a ring: slot index and the parity of the phase that the next use of the slot completes.
template <int kStages>
struct Ring {
  int slot = 0;
  uint32_t phase = 0;
  __device__ void advance() {
    if (++slot == kStages) {
      slot = 0;
      phase ^= 1;
    }
  }
};

template <int kStages>
__device__ void produce_weights(const TokenMaps& maps, const TokenArgs& args, int ring_index,
                                uint32_t ring_base, TokenBarriers& bars) {
  int first = args.section.steps_offset;
  for (int w = 0; w < ring_index; ++w) first += 4 * args.section.num_steps[w];
  const int4* steps = reinterpret_cast<const int4*>(args.plan + first);
  const int count = args.section.num_steps[ring_index];
  if (count == 0) return;
  Ring<kStages> ring;
  for (int tile = blockIdx.x; tile < args.token_tiles; tile += gridDim.x) {
    int4 next = __ldg(steps);
    for (int i = 0; i < count; ++i) {
      const int4 step = next;
      if (i + 1 < count) next = __ldg(steps + i + 1);
      if (step.w & kTokenNoProduct) continue;
      const uint32_t full = device::smem_address(&bars.w_full[ring_index][ring.slot]);
      device::mbarrier_wait(device::smem_address(&bars.w_empty[ring_index][ring.slot]),
                            ring.phase ^ 1);
      device::mbarrier_expect_tx(full, kTokenTileBytes);
      const CUtensorMap* map = (step.w & kTokenFactorIn)    ? &maps.factor_in
                               : (step.w & kTokenFactorOut) ? &maps.factor_out
                                                            : &maps.blocks;
      device::tma_load_2d(ring_base + ring.slot * kTokenTileBytes, map, full, step.y, step.z);
      ring.advance();
    }
  }
}

__device__ inline void produce_x(const TokenMaps& maps, const TokenArgs& args, uint32_t x_base,
                                 TokenBarriers& bars) {
  const int2* loads = reinterpret_cast<const int2*>(args.plan + args.section.loads_offset);
  uint32_t phase = 0;
  for (int tile = blockIdx.x; tile < args.token_tiles; tile += gridDim.x, phase ^= 1) {
    for (int i = 0; i < args.section.num_loads; ++i) {
      const int x = __ldg(loads + i).x;
      const uint32_t full = device::smem_address(&bars.x_full[x]);
      device::mbarrier_wait(device::smem_address(&bars.x_empty[x]), phase ^ 1);
      device::mbarrier_expect_tx(full, kTokenTileBytes);
      device::tma_load_2d(x_base + x * kTokenTileBytes, &maps.x, full, x * kTokenTile,
                          tile * kTokenTile);
    }
  }
}

// Address in a swizzled [64 tokens][64 features] tile of the 8x8 matrix row that this lane serves in
// the j-th stmatrix/ldmatrix.x4.trans of a warp's m64n64 accumulator slice.
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
    device::ldmatrix_x4_trans(fragment_address(tile, j), r);
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      const float2 a = device::unpack2<T>(r[h]);
      acc[j * 8 + h * 2] = f(acc[j * 8 + h * 2], a.x);
      acc[j * 8 + h * 2 + 1] = f(acc[j * 8 + h * 2 + 1], a.y);
    }
  }
}

// One consumer warpgroup. `bar` is its named barrier; `leader` its one thread that talks to TMA.
template <typename T, bool kTransposed, int kStages>
struct Consumer {
  const TokenMaps& maps;
  const TokenArgs& args;
  TokenBarriers& bars;
  int warpgroup;
  uint32_t x_base, t_tile, ring_base, staging;
  bool leader;
  uint32_t aux_phase = 0;

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

  __device__ void load_aux(int feature, int token) {
    drain();
    const uint32_t bar = device::smem_address(&bars.aux_full[warpgroup]);
    if (leader) {
      device::mbarrier_expect_tx(bar, kTokenTileBytes);
      device::tma_load_2d(staging, &maps.aux, bar, feature, token);
    }
    device::mbarrier_wait(bar, aux_phase);
    aux_phase ^= 1;
  }

  __device__ void epilogue(float (&acc)[32], int out_tile, int token) {
    const int feature = out_tile * kTokenTile;
    const Activation activation = args.activation;
    if (args.has_preact) {
      drain();
      store_tile<T>(acc, staging);
      store(&maps.preact, staging, feature, token);
    }
    if (args.has_z) {
      load_aux(feature, token);
      combine_tile<T>(acc, staging, [=](float a, float z) {
        return a * device::activation_derivative(activation, z);
      });
    } else {
      device::activate(activation, acc);
    }
    if (args.has_residual) {
      load_aux(feature, token);
      combine_tile<T>(acc, staging, [](float a, float b) { return a + b; });
    }
    drain();
    store_tile<T>(acc, staging);
    store(&maps.y, staging, feature, token);
  }

  // The finished t goes to shared memory for everyone and to global memory for the backward pass.
  __device__ void publish_t(const float (&acc)[32], int token, uint32_t phase) {
    device::mbarrier_wait(device::smem_address(&bars.t_empty), phase ^ 1);
    drain();
    store_tile<T>(acc, t_tile);
    store(&maps.t, t_tile, 0, token);
    device::mbarrier_arrive(device::smem_address(&bars.t_full));
  }

  __device__ void begin_row(float (&acc)[32], int flags) {
    float low = 0.f, high = 0.f;
    if (args.bias != nullptr && !(flags & kTokenFactorIn)) {
      const int m = (flags >> kTokenRowShift) * kTokenTile + threadIdx.x % 128 / 32 * 16 +
                    threadIdx.x % 32 / 4;
      const T* bias = static_cast<const T*>(args.bias);
      if (m < args.out_features) low = device::to_float(bias[m]);
      if (m + 8 < args.out_features) high = device::to_float(bias[m + 8]);
    }
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
      acc[i] = acc[i + 1] = low;
      acc[i + 2] = acc[i + 3] = high;
    }
  }

  __device__ void run() {
    int first = args.section.steps_offset;
    for (int w = 0; w < warpgroup; ++w) first += 4 * args.section.num_steps[w];
    const int4* steps = reinterpret_cast<const int4*>(args.plan + first);
    const int count = args.section.num_steps[warpgroup];
    if (count == 0) return;
    const bool warp_leader = threadIdx.x % 32 == 0;
    Ring<kStages> ring;
    uint32_t phase = 0;  // of x and t: one per token tile
    float acc[32];
    for (int tile = blockIdx.x; tile < args.token_tiles; tile += gridDim.x, phase ^= 1) {
      // What the previous step's products still read: released once they are known to be done.
      uint32_t held_slot = 0, held_x = 0;
      auto release = [&] {
        if (held_slot != 0 && warp_leader) device::mbarrier_arrive(held_slot);
        if (held_x != 0 && warp_leader) device::mbarrier_arrive(held_x);
        held_slot = held_x = 0;
      };
      int4 next = __ldg(steps);
      for (int i = 0; i < count;) {
        const int row = next.w;
        begin_row(acc, row);
        if (row & kTokenNoProduct) {
          if (++i < count) next = __ldg(steps + i);
        } else {
          int4 step;
          do {
            step = next;
            if (++i < count) next = __ldg(steps + i);
            const bool is_t = step.w & kTokenFactorOut;
            uint64_t* x_full = is_t ? &bars.t_full : &bars.x_full[step.x];
            uint64_t* x_empty = is_t ? &bars.t_empty : &bars.x_empty[step.x];
            device::mbarrier_wait(device::smem_address(x_full), phase);
            device::mbarrier_wait(device::smem_address(&bars.w_full[warpgroup][ring.slot]),
                                  ring.phase);
            const uint32_t a = ring_base + ring.slot * kTokenTileBytes;
            const uint32_t b = is_t ? t_tile : x_base + step.x * kTokenTileBytes;
            const uint64_t a_desc =
                kTransposed ? device::descriptor_mn_major(a, 0) : device::descriptor_k_major(a);
            const uint64_t b_desc = device::descriptor_k_major(b);
            constexpr int kStepA = kTransposed ? 128 : 2;  // descriptor units of 16 bytes per k16
            device::wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              device::wgmma_m64n64<T, kTransposed, false>(acc, a_desc + k * kStepA, b_desc + k * 2);
            }
            device::wgmma_commit();
            device::wgmma_wait<1>();
            release();
            held_slot = device::smem_address(&bars.w_empty[warpgroup][ring.slot]);
            if (step.w & kTokenRelease) held_x = device::smem_address(x_empty);
            ring.advance();
          } while (!(step.w & kTokenRowEnd));
          device::wgmma_wait<0>();
          release();
        }
        if (row & kTokenFactorIn) {
          publish_t(acc, tile * kTokenTile, phase);
        } else {
          epilogue(acc, row >> kTokenRowShift, tile * kTokenTile);
        }
      }
    }
    if (leader) device::tma_store_wait<0>();
  }
};

}  // namespace tokens

template <typename T, bool kTransposed, int kStages>
__global__ void __launch_bounds__(kTokenThreads, 1)
    product_tokens_sm90(const __grid_constant__ TokenMaps maps,
                        const __grid_constant__ TokenArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t raw[];
  __shared__ TokenBarriers bars;
  const uint32_t base = (device::smem_address(raw) + 1023) & ~1023u;
  const uint32_t t_tile = base + args.section.num_x_tiles * kTokenTileBytes;
  const uint32_t rings = t_tile + (args.has_rank ? kTokenTileBytes : 0);
  constexpr int kPerWarpgroup = (kStages + 1) * kTokenTileBytes;  // ring and staging

  if (threadIdx.x == 0) {
    const int2* loads = reinterpret_cast<const int2*>(args.plan + args.section.loads_offset);
    for (int i = 0; i < args.section.num_loads; ++i) {
      const int2 load = __ldg(loads + i);
      device::mbarrier_init(device::smem_address(&bars.x_full[load.x]), 1);
      device::mbarrier_init(device::smem_address(&bars.x_empty[load.x]), 4 * load.y);
    }
    for (int w = 0; w < kTokenWarpgroups; ++w) {
      for (int s = 0; s < kStages; ++s) {
        device::mbarrier_init(device::smem_address(&bars.w_full[w][s]), 1);
        device::mbarrier_init(device::smem_address(&bars.w_empty[w][s]), 4);
      }
      device::mbarrier_init(device::smem_address(&bars.aux_full[w]), 1);
    }
    device::mbarrier_init(device::smem_address(&bars.t_full), 128);
    device::mbarrier_init(device::smem_address(&bars.t_empty), max(1, 4 * args.section.t_users));
    device::mbarrier_init_fence();
  }
  __syncthreads();

  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (warpgroup == kTokenWarpgroups) {
    const int warp = threadIdx.x / 32 % 4;
    if (threadIdx.x % 32 == 0) {
      if (warp == 3) {
        tokens::produce_x(maps, args, base, bars);
      } else if (warp < kTokenWarpgroups) {
        tokens::produce_weights<kStages>(maps, args, warp, rings + warp * kPerWarpgroup, bars);
      }
    }
  } else {
    const uint32_t ring = rings + warpgroup * kPerWarpgroup;
    tokens::Consumer<T, kTransposed, kStages> consumer{
        maps, args, bars, warpgroup, base, t_tile, ring, ring + kStages * kTokenTileBytes,
        threadIdx.x % 128 == 0};
    consumer.run();
  }
#endif
}

}  // namespace pixelfly
