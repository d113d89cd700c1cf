// Products of a 64x64 weight tile, wgmma's A (M = 64), with a tile of tokens, by a warpgroup; and
// their sums over a cluster; Hopper (sm_90a).
#pragma once

#include "device/cluster.cuh"
#include "device/shared_memory.cuh"
#include "device/wgmma.cuh"

namespace pixelfly {

// `kTransposed`: the weight tile's rows are contraction features.
template <bool kTransposed>
__device__ __forceinline__ uint64_t weight_descriptor(uint32_t tile) {
  return kTransposed ? device::descriptor_mn_major(tile, 0) : device::descriptor_k_major(tile);
}

// sums += weight tile times the i-th tile of x, asynchronously; the first overwrites them.
template <typename T, bool kTransposed, int kSums>
__device__ __forceinline__ void multiply_by_weights(float (&sums)[kSums], uint64_t weights,
                                                    uint64_t x, int i) {
  constexpr int kStep = kTransposed ? 128 : 2;
  device::wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    device::wgmma<T, kTransposed, false>(sums, weights + k * kStep, x + k * 2, (i | k) != 0);
  }
  device::wgmma_commit();
}

// What a cluster's thread blocks, which follow each other in z, send each other of 64 tokens' sums:
// in each, [thread block they come from][8 tokens of the 64 / gridDim.z that are added here]
// [thread of the warpgroup] of 16 bytes.
constexpr int kClusterSumsBytes = 64 * 64 * 4;

// Of the 64 tokens' sums, the cluster's total for those that this thread block stores: always added
// in the same order. `place`: this thread's 16 bytes of the first part above, in every thread block
// of the cluster, which nobody reads or writes otherwise.
__device__ __forceinline__ void add_over_cluster(float (&acc)[32], uint32_t place) {
  const int blocks = gridDim.z, mine = blockIdx.z, parts = 8 / blocks;  // of 8 tokens
  constexpr int kPartBytes = 128 * 16;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    device::store_shared_of(
        i / parts, place + (mine * parts + i % parts) * kPartBytes,
        make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));
  }
  device::cluster_sync();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i >= parts) break;
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[4 * i + e] = 0;
    for (int from = 0; from < blocks; ++from) {
      const uint4 v = device::load_shared_vector(place + (from * parts + i) * kPartBytes);
      acc[4 * i] += __uint_as_float(v.x);
      acc[4 * i + 1] += __uint_as_float(v.y);
      acc[4 * i + 2] += __uint_as_float(v.z);
      acc[4 * i + 3] += __uint_as_float(v.w);
    }
  }
}

}  // namespace pixelfly
