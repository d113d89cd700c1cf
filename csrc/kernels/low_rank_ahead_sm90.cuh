// t = x · vᵀ, and s = dz · u, beside the product that reads them; Hopper (sm_90a).
//
// A few thread blocks form t tile by tile while product_sm90 runs on the other multiprocessors: x
// comes from memory once for both, where low_rank_sm90 before the product reads all of it alone. A
// flag for each token tile says that t is there. The product is a dependent launch: it starts when
// every thread block of this kernel runs (and has lowered its flags), so that its waits end. This
// kernel is one too: only its barriers are ready before the kernel before it has ended.
//
// A thread block takes token tiles of 128 in turn. The factor tile is wgmma's A (M = 64 ranks),
// tokens are N; the accumulators hold tᵀ and leave through stmatrix.trans and a TMA store.
//
//   shared memory: ring [stages] of x tiles [128 tokens][64] (16 KB)
//                  staging [128 tokens][64 ranks]
//                  factor tiles: all of them, loaded once, if they fit; else one a stage
//   roles: warps 0-3 multiply, one thread of warp 4 loads, one of warp 5 stores and raises flags
//   full[s], empty[s]: as in product_sm90
//   staged: the four warps -> the storing thread; staging_free: back
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "device/convert.cuh"
#include "device/dependent_launch.cuh"
#include "device/elect.cuh"
#include "device/flag.cuh"
#include "device/ldmatrix.cuh"
#include "device/mbarrier.cuh"
#include "device/shared_memory.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"
#include "kernels/low_rank_sm90.cuh"
#include "kernels/product_sm90_rows.cuh"
#include "kernels/product_sm90_work.cuh"
#include "kernels/thirds.cuh"
#include "kernels/tile_sm90.cuh"

namespace pixelfly {

struct AheadArgs {
  int32_t num_tiles;    // of features
  int32_t token_tiles;  // of kGroupTokens
  int32_t stages;
  bool resident;   // whether the factor stays in shared memory
  int32_t* ready;  // [token_tiles] flags
};

constexpr int kAheadThreads = 192;
constexpr int kMaxAheadStages = 8;

struct AheadShared {
  uint64_t full[kMaxAheadStages];
  uint64_t empty[kMaxAheadStages];
  uint64_t staged;
  uint64_t staging_free;
};

namespace ahead {

struct Layout {
  uint32_t base, staging, factor, barriers;

  __device__ Layout(uint32_t dynamic, const AheadArgs& args, uint32_t shared)
      : base((dynamic + 1023) & ~1023u),
        staging(base + args.stages * kGroupXBytes),
        factor(staging + kGroupXBytes),
        barriers(shared) {}
  __device__ uint32_t x(int stage) const { return base + stage * kGroupXBytes; }
  __device__ uint32_t full(int stage) const { return barriers + 8 * stage; }
  __device__ uint32_t empty(int stage) const { return barriers + 8 * (kMaxAheadStages + stage); }
  __device__ uint32_t staged() const { return barriers + 16 * kMaxAheadStages; }
  __device__ uint32_t staging_free() const { return staged() + 8; }
};

// One thread.
template <bool kTransposed, bool kThirds>
__device__ void load(const LowRankMaps& maps, const AheadArgs& args, const Layout& layout) {
  Ring ring{args.stages};
  bool load_factor = true;
  for (int tile = blockIdx.x; tile < args.token_tiles; tile += gridDim.x) {
    for (int i = 0; i < args.num_tiles; ++i) {
      const uint32_t full = layout.full(ring.stage);
      device::mbarrier_wait(layout.empty(ring.stage), ring.phase ^ 1);
      device::mbarrier_expect_tx(full, kGroupXBytes + (load_factor ? kGroupTileBytes : 0));
      TilePlace place{0, i};
      if constexpr (kThirds) place = place_of_tile(i, args.num_tiles / 3);
      device::tma_load_2d(layout.x(ring.stage), &maps.x[place.matrix], full,
                          place.tile * kGroupTile, tile * kGroupTokens);
      if (load_factor) {
        const uint32_t at = layout.factor + (args.resident ? i : ring.stage) * kGroupTileBytes;
        const int feature = i * kGroupTile;
        device::tma_load_2d(at, &maps.factor, full, kTransposed ? 0 : feature,
                            kTransposed ? feature : 0);
      }
      ring.advance();
    }
    load_factor = !args.resident;
  }
}

// One thread.
inline __device__ void store(const LowRankMaps& maps, const AheadArgs& args, const Layout& layout) {
  uint32_t phase = 0;
  for (int tile = blockIdx.x; tile < args.token_tiles; tile += gridDim.x, phase ^= 1) {
    device::mbarrier_wait(layout.staged(), phase);
    device::tma_store_2d(&maps.t, layout.staging, 0, tile * kGroupTokens);
    device::tma_store_commit();
    device::tma_store_wait<0>();
    device::mbarrier_arrive(layout.staging_free());
    device::raise_flag(args.ready + tile);
  }
}

// One warpgroup.
template <typename T, bool kTransposed>
__device__ void multiply(const AheadArgs& args, const Layout& layout) {
  Ring ring{args.stages};
  uint32_t phase = 0;
  auto leader_arrives = [&](uint32_t barrier) {
    if (threadIdx.x % 32 == 0) device::mbarrier_arrive(barrier);
  };
  for (int tile = blockIdx.x; tile < args.token_tiles; tile += gridDim.x, phase ^= 1) {
    float acc[64];
    int previous = -1;
    for (int i = 0; i < args.num_tiles; ++i) {
      const uint32_t factor = layout.factor + (args.resident ? i : ring.stage) * kGroupTileBytes;
      const uint64_t a = weight_descriptor<kTransposed>(factor);
      const uint64_t b = device::descriptor_k_major(layout.x(ring.stage));
      device::mbarrier_wait(layout.full(ring.stage), ring.phase);
      multiply_by_weights<T, kTransposed>(acc, a, b, i);
      device::wgmma_wait<1>();
      if (previous >= 0) leader_arrives(layout.empty(previous));
      previous = ring.stage;
      ring.advance();
    }
    device::wgmma_wait<0>();
    leader_arrives(layout.empty(previous));
    device::mbarrier_wait(layout.staging_free(), phase ^ 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* values = acc + half * 32 + j * 8;
        uint32_t r[4];
#pragma unroll
        for (int h = 0; h < 4; ++h) r[h] = device::pack2<T>(values[h * 2], values[h * 2 + 1]);
        const uint32_t tokens = layout.staging + half * kGroupTileBytes;
        device::stmatrix_x4_trans(groups::fragment_address(tokens, j), r);
      }
    }
    device::fence_proxy_async();
    __syncwarp();
    leader_arrives(layout.staged());
  }
}

}  // namespace ahead

template <typename T, bool kTransposed, bool kThirds>
__global__ void __launch_bounds__(kAheadThreads, 1)
    low_rank_ahead_sm90(const __grid_constant__ LowRankMaps maps,
                        const __grid_constant__ AheadArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ AheadShared shared;
  const ahead::Layout layout(device::smem_address(device::dynamic_shared()), args,
                             device::smem_address(&shared));
  if (threadIdx.x == 0) {
    for (int s = 0; s < args.stages; ++s) {
      device::mbarrier_init(layout.full(s), 1);
      device::mbarrier_init(layout.empty(s), 4);
    }
    device::mbarrier_init(layout.staged(), 4);
    device::mbarrier_init(layout.staging_free(), 1);
    device::mbarrier_init_fence();
  }
  device::wait_for_previous_kernel();
  for (int tile = blockIdx.x + gridDim.x * threadIdx.x; tile < args.token_tiles;
       tile += gridDim.x * blockDim.x) {
    args.ready[tile] = 0;
  }
  __threadfence();
  __syncthreads();
  device::allow_dependent_launch();

  if (threadIdx.x < 128) {
    ahead::multiply<T, kTransposed>(args, layout);
  } else if (device::elect_one()) {
    if (threadIdx.x < 160) {
      ahead::load<kTransposed, kThirds>(maps, args, layout);
    } else {
      ahead::store(maps, args, layout);
    }
  }
#endif
}

}  // namespace pixelfly
