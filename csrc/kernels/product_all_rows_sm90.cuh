// y = x · Bᵀ + t · uᵀ + bias with t = x · vᵀ formed on the way, and dx = dz · B + s · v likewise,
// for layers of few outputs; Hopper (sm_90a).
//
// product_sm90 keeps a group's weights and reads x once for each group; t needs a kernel before it
// that reads x too. Here two thread blocks (three beyond 768 outputs) keep the sums of all output
// rows of 128 tokens, half of the rows each: x is read once by each of them, t comes from the same
// tiles, and it is the weights that are read again for every token tile. That pays where a layer
// narrows. A dense row is no trouble: it is one of six.
//
//   roles: warpgroups 0 and 1 consume, three output tiles of 64 features each, 192 accumulators a
//          thread. In warpgroup 2 a thread loads x, and one for each consumer its weight tiles.
//          Tokens are wgmma's N, as in product_sm90.
//   rings: x [128 tokens][64], and with low rank beside it the thread block's 32 ranks of v;
//          weight tiles [64][64] for each consumer. Each has barriers full (landed) and empty
//          (their readers' warps are done).
//   parts: who makes which rows (planner/all_rows.cpp). At its next token tile a thread block takes
//          the next part, as parts with a dense row take longer.
//
// With low rank the two thread blocks are a cluster. A consumer forms t of 64 tokens and 32 ranks,
// tokens as wgmma's M, and sends it, rounded, to both, where it is one more tile of x.
//   t_full: t of all ranks has come; t_free: its readers in both thread blocks are done.
//
// Outputs leave when all steps of a token tile are done; loads for the next one go on meanwhile.
//
// Where less than half of the thread blocks would have a last token tile, these are cut in two, of
// 64 tokens each. Then the first consumer alone forms t.
#pragma once

#include "device/cluster.cuh"
#include "device/convert.cuh"
#include "device/dependent_launch.cuh"
#include "device/elect.cuh"
#include "device/ldmatrix.cuh"
#include "device/mbarrier.cuh"
#include "device/register_budget.cuh"
#include "device/shared_memory.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"
#include "kernels/product_all_rows_sm90_work.cuh"
#include "kernels/product_sm90_rows.cuh"
#include "kernels/ring.cuh"
#include "kernels/tile_sm90.cuh"

namespace pixelfly {

namespace all_rows {

// The thread that loads x, and with it a part of the factor of t.
template <bool kTransposed, bool kLowRank>
__device__ __forceinline__ void load_x(const AllRowsMaps& maps, const AllRowsArgs& args,
                                       const Layout<kLowRank>& layout) {
  const auto* columns =
      reinterpret_cast<const AllRowsColumn*>(args.plan + args.section.columns_offset);
  const int ranks = blockIdx.z % 2 * kAllRowsRanks;
  Ring ring{Layout<kLowRank>::kXStages};
  for (Turn turn(args); turn.more(); turn.next()) {
    int next = __ldg(&columns[0].x_tile);
#pragma unroll 1
    for (int c = 0; c < args.section.num_columns; ++c) {
      const int feature = next * kGroupTile;
      if (c + 1 < args.section.num_columns) next = __ldg(&columns[c + 1].x_tile);
      const uint32_t full = layout.x_full(ring.stage);
      device::mbarrier_wait(layout.x_empty(ring.stage), ring.phase ^ 1);
      device::mbarrier_expect_tx(full, turn.halves() * kTileBytes + (kLowRank ? kFactorBytes : 0));
      for (int half = 0; half < turn.halves(); ++half) {
        device::tma_load_2d(layout.x(ring.stage) + half * kTileBytes, &maps.x, full, feature,
                            turn.first_token() + half * kHalfTokens);
      }
      if (kLowRank) {
        device::tma_load_2d(layout.factor(ring.stage), &maps.factor_in, full,
                            kTransposed ? ranks : feature, kTransposed ? feature : ranks);
      }
      ring.advance();
    }
  }
}

// The thread that loads a consumer's weight tiles: of blocks, then of the factor.
template <bool kTransposed, bool kLowRank>
__device__ __forceinline__ void load_weights(const AllRowsMaps& maps, const AllRowsArgs& args,
                                             const Layout<kLowRank>& layout, int consumer) {
  Ring ring{kWeightStages};
  for (Turn turn(args); turn.more(); turn.next()) {
    const AllRowsPart& part = turn.rows();
    const int32_t* steps = args.plan + __ldg(&part.steps_offset[consumer]);
    const int count =
        __ldg(&part.num_weights[consumer]) + (kLowRank ? __ldg(&part.num_rows[consumer]) : 0);
    int next = __ldg(steps);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const int step = next;
      next = __ldg(steps + i + 1);
      const uint32_t full = layout.weight_full(consumer, ring.stage);
      device::mbarrier_wait(layout.weight_empty(consumer, ring.stage), ring.phase ^ 1);
      device::mbarrier_expect_tx(full, kTileBytes);
      const CUtensorMap* map = &maps.blocks;
      int col = (step & ((1 << args.weight_shift) - 1)) * kGroupTile;
      int row = (step >> args.weight_shift) * kGroupTile;
      if (kLowRank && step < 0) {
        map = &maps.factor;
        col = kTransposed ? ~step * kGroupTile : 0;
        row = kTransposed ? 0 : ~step * kGroupTile;
      }
      device::tma_load_2d(layout.weight(consumer, ring.stage), map, full, col, row);
      ring.advance();
    }
  }
}

template <typename T, bool kTransposed, bool kLowRank>
struct Consumer {
  // Of an output tile: 64 features by one or two halves of a token tile.
  template <int kHalves>
  using Sums = float[kHalves * kHalfTokens / 2];
  using SumsOfT = float[kAllRowsRanks / 2];  // 64 tokens

  const AllRowsMaps& maps;
  const AllRowsArgs& args;
  const Layout<kLowRank>& layout;
  int consumer;

  // Recomputed where they are used: no register keeps them across the products.
  __device__ static bool leader() { return threadIdx.x % 128 == 0; }
  __device__ static bool of_warp() { return threadIdx.x % 32 == 0; }
  __device__ void synchronize() const { device::named_barrier_sync(1 + consumer, 128); }

  __device__ void release_x(int stage) const {
    if (stage >= 0 && of_warp()) device::mbarrier_arrive(layout.x_empty(stage));
  }
  __device__ void release_weight(int stage) const {
    if (stage >= 0 && of_warp()) device::mbarrier_arrive(layout.weight_empty(consumer, stage));
  }

  // sums += the ring's next weight tile · a tile of tokens, asynchronously; the first overwrites
  // them.
  template <int kSums>
  __device__ __forceinline__ void multiply(float (&sums)[kSums], const Ring& ring, uint32_t tokens,
                                           bool first) const {
    device::mbarrier_wait(layout.weight_full(consumer, ring.stage), ring.phase);
    const uint64_t a = weight_descriptor<kTransposed>(layout.weight(consumer, ring.stage));
    const uint64_t b = device::descriptor_k_major(tokens);
    device::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      device::wgmma<T, kTransposed, false>(sums, a + k * (kTransposed ? 128 : 2), b + k * 2,
                                           k > 0 || !first);
    }
    device::wgmma_commit();
  }

  // t += this consumer's 64 tokens of an x tile · the factor's tile beside it, asynchronously.
  __device__ __forceinline__ void multiply_t(SumsOfT& t, int stage, bool first) const {
    const uint64_t a = device::descriptor_k_major(layout.x(stage) + consumer * kTileBytes);
    const uint64_t b = kTransposed ? device::descriptor_narrow(layout.factor(stage))
                                   : device::descriptor_k_major(layout.factor(stage));
    device::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      device::wgmma<T, false, kTransposed>(t, a + k * 2, b + k * (kTransposed ? 64 : 2),
                                           k > 0 || !first);
    }
    device::wgmma_commit();
  }

  // Rounded, to the tiles of t of both thread blocks, which nobody reads any more.
  template <int kHalves>
  __device__ __forceinline__ void send_t(const SumsOfT& t) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const int first = consumer * kHalfTokens + warp * 16 + lane / 4;
#pragma unroll
    for (int to = 0; to < 2 && consumer < kHalves; ++to) {
#pragma unroll
      for (int i = 0; i < kAllRowsRanks / 4; ++i) {
        const int token = first + i % 2 * 8;
        const int chunk = blockIdx.z % 2 * (kAllRowsRanks / 8) + i / 2;
        device::store_shared_of(
            to, layout.t() + token * 128 + ((chunk ^ (token & 7)) << 4) + lane % 4 * 4,
            device::pack2<T>(t[2 * i], t[2 * i + 1]));
      }
    }
    device::fence_proxy_async_cluster();
    synchronize();
    if (leader()) {
      for (int to = 0; to < 2; ++to) device::mbarrier_arrive_of(to, layout.t_full());
    }
  }

  // sums += t · factor, once t is complete; also stores it, one half from either thread block.
  template <int kHalves>
  __device__ __forceinline__ void add_low_rank(Sums<kHalves> (&sums)[kAllRowsOutputs],
                                               uint32_t fresh, const int32_t* rows,
                                               const SumsOfT& t, const Turn& turn, uint32_t phase,
                                               Ring& weights) const {
    device::mbarrier_wait_cluster(layout.t_free(), phase ^ 1);
    send_t<kHalves>(t);
    device::mbarrier_wait_cluster(layout.t_full(), phase);
    device::fence_proxy_async_cluster();
    const int half = blockIdx.z % 2;
    if (leader() && consumer == 0 && half < kHalves) {
      device::tma_store_2d(&maps.t, layout.t() + half * kTileBytes, 0,
                           turn.first_token() + half * kHalfTokens);
      device::tma_store_commit();
    }
#pragma unroll
    for (int i = 0; i < kAllRowsOutputs; ++i) {
      if (__ldg(rows + i) >= 0) {
        multiply(sums[i], weights, layout.t(), fresh >> i & 1);
        device::wgmma_wait<0>();
        release_weight(weights.stage);
        weights.advance();
      }
    }
    if (leader() && consumer == 0) device::tma_store_wait_read<0>();
    __syncwarp();
    if (of_warp()) {
      for (int to = 0; to < 2; ++to) device::mbarrier_arrive_of(to, layout.t_free());
    }
  }

  // A token tile of an output tile: rounded, through staging, to global memory.
  template <int kHalves>
  __device__ __forceinline__ void store(const Sums<kHalves>& sums, int row, int token) const {
    float bias[2] = {0, 0};
    const int feature = row * kGroupTile + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (args.bias != nullptr && feature + i * 8 < args.out_features) {
        bias[i] = device::to_float(static_cast<const T*>(args.bias)[feature + i * 8]);
      }
    }
    const uint32_t staging = layout.staging(consumer);
    if (leader()) device::tma_store_wait_read<0>();
    synchronize();
#pragma unroll
    for (int j = 0; j < 4 * kHalves; ++j) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = sums + j * 8 + i * 2;
        words[i] = device::pack2<T>(pair[0] + bias[i % 2], pair[1] + bias[i % 2]);
      }
      device::stmatrix_x4_trans(groups::fragment_address(staging + j / 4 * kTileBytes, j % 4),
                                words);
    }
    device::fence_proxy_async();
    synchronize();
    if (leader()) {
      for (int half = 0; half < kHalves; ++half) {
        device::tma_store_2d(&maps.y, staging + half * kTileBytes, row * kGroupTile,
                             token + half * kHalfTokens);
      }
      device::tma_store_commit();
    }
  }

  template <int kHalves>
  __device__ __forceinline__ void make(const Turn& turn, uint32_t phase, Ring& x,
                                       Ring& weights) const {
    Sums<kHalves> sums[kAllRowsOutputs];
    SumsOfT t;
    const bool forms_t = kLowRank && consumer < kHalves;
    uint32_t fresh = (1 << kAllRowsOutputs) - 1;  // outputs without a product
    int last_x = -1, last_weight = -1;            // stages that products may still read
    for (int c = 0; c < args.section.num_columns; ++c) {
      const uint32_t uses =
          device::load_shared_word(layout.uses(c)) >> kAllRowsOutputs * (2 * turn.part + consumer);
      const uint32_t tokens = layout.x(x.stage);
      device::mbarrier_wait(layout.x_full(x.stage), x.phase);
      // Each case commits and waits by itself, as in product_sm90.
      if (forms_t) {
        multiply_t(t, x.stage, c == 0);
        device::wgmma_wait<1>();
        release_weight(last_weight);
        release_x(last_x);
        last_weight = last_x = -1;
      }
#pragma unroll
      for (int i = 0; i < kAllRowsOutputs; ++i) {
        if (uses >> i & 1) {
          multiply(sums[i], weights, tokens, fresh >> i & 1);
          device::wgmma_wait<1>();
          release_weight(last_weight);
          release_x(last_x);
          fresh &= ~(1u << i);
          last_weight = weights.stage;
          last_x = -1;
          weights.advance();
        }
      }
      if (!forms_t && (uses & ((1 << kAllRowsOutputs) - 1)) == 0) {
        device::wgmma_wait<0>();
        release_weight(last_weight);
        release_x(last_x);
        last_weight = -1;
      }
      last_x = x.stage;
      x.advance();
    }
    device::wgmma_wait<0>();
    release_weight(last_weight);
    release_x(last_x);
    const int32_t* rows = turn.rows().rows[consumer];
    if constexpr (kLowRank) add_low_rank<kHalves>(sums, fresh, rows, t, turn, phase, weights);
#pragma unroll
    for (int i = 0; i < kAllRowsOutputs; ++i) {
      const int row = __ldg(rows + i);
      if (row >= 0) store<kHalves>(sums[i], row, turn.first_token());
    }
  }

  __device__ void run() const {
    Ring x{Layout<kLowRank>::kXStages}, weights{kWeightStages};
    uint32_t phase = 0;
    Turn turn(args);
    for (; turn.whole(); turn.next(), phase ^= 1) make<2>(turn, phase, x, weights);
    for (; turn.more(); turn.next(), phase ^= 1) make<1>(turn, phase, x, weights);
    if (leader()) device::tma_store_wait<0>();
  }
};

}  // namespace all_rows

template <typename T, bool kTransposed, bool kLowRank>
__global__ void __launch_bounds__(kAllRowsThreads, 1)
    product_all_rows_sm90(const __grid_constant__ AllRowsMaps maps,
                          const __grid_constant__ AllRowsArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Layout = all_rows::Layout<kLowRank>;
  const Layout layout{
      device::opaque((device::smem_address(device::dynamic_shared()) + 1023) & ~1023u)};
  const auto* columns =
      reinterpret_cast<const AllRowsColumn*>(args.plan + args.section.columns_offset);
  for (int c = threadIdx.x; c < args.section.num_columns; c += kAllRowsThreads) {
    device::store_shared(layout.uses(c), static_cast<uint32_t>(__ldg(&columns[c].uses)));
  }
  if (threadIdx.x == 0) {
    for (int s = 0; s < Layout::kXStages; ++s) {
      device::mbarrier_init(layout.x_full(s), 1);
      device::mbarrier_init(layout.x_empty(s), 8);
    }
    for (int consumer = 0; consumer < 2; ++consumer) {
      for (int s = 0; s < all_rows::kWeightStages; ++s) {
        device::mbarrier_init(layout.weight_full(consumer, s), 1);
        device::mbarrier_init(layout.weight_empty(consumer, s), 4);
      }
    }
    device::mbarrier_init(layout.t_full(), 4);   // consumers of both thread blocks
    device::mbarrier_init(layout.t_free(), 16);  // their warps
    device::mbarrier_init_fence();
  }
  __syncthreads();
  if (kLowRank) device::cluster_sync();
  if (args.early_start) device::allow_dependent_launch();
  device::wait_for_previous_kernel();

  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp >= 8) {
    device::release_registers<24>();
    if (warp == 8) {
      if (device::elect_one()) all_rows::load_x<kTransposed, kLowRank>(maps, args, layout);
    } else if (warp < 11) {
      if (device::elect_one()) {
        all_rows::load_weights<kTransposed, kLowRank>(maps, args, layout, warp - 9);
      }
    }
  } else {
    device::claim_registers<240>();
    all_rows::Consumer<T, kTransposed, kLowRank>{maps, args, layout, warp / 4}.run();
  }
  // Nobody's shared memory is written to after its thread block has ended.
  if (kLowRank) device::cluster_sync();
#endif
}

}  // namespace pixelfly
