// product_sm90's epilogue: accumulators, activations and slopes to global memory.
#pragma once

#include "device/activation_codes.cuh"
#include "device/convert.cuh"
#include "device/ldmatrix.cuh"
#include "device/mbarrier.cuh"
#include "device/shared_memory.cuh"
#include "device/tma.cuh"
#include "kernels/product_sm90_columns.cuh"
#include "kernels/product_sm90_rows.cuh"
#include "kernels/product_sm90_slope.cuh"
#include "kernels/product_sm90_work.cuh"

namespace pixelfly {

namespace groups {

// A consumer warpgroup's way from accumulators to global memory.
template <typename T, bool kTransposed, bool kCooperative, bool kPlain, bool kColumns>
struct Epilogue {
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
};

}  // namespace groups

}  // namespace pixelfly
