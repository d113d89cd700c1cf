// TMA: bulk tensor copies between global and shared memory through a tensor map.
// Coordinates are (column, row) or (column, row, plane) in elements; out-of-range parts load as
// zeros and are not stored.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace pixelfly::device {

__device__ __forceinline__ void tma_load_2d(uint32_t shared, const CUtensorMap* map,
                                            uint32_t barrier, int col, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3,%4}], [%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(col), "r"(row)
      : "memory");
}
__device__ __forceinline__ void tma_store_2d(const CUtensorMap* map, uint32_t shared, int col,
                                             int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2,%3}], [%1];" ::"l"(map),
      "r"(shared), "r"(col), "r"(row)
      : "memory");
}
__device__ __forceinline__ void tma_load_3d(uint32_t shared, const CUtensorMap* map,
                                            uint32_t barrier, int col, int row, int plane) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3,%4,%5}], [%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(col), "r"(row), "r"(plane)
      : "memory");
}
__device__ __forceinline__ void tma_store_3d(const CUtensorMap* map, uint32_t shared, int col,
                                             int row, int plane) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2,%3,%4}], [%1];" ::"l"(map),
      "r"(shared), "r"(col), "r"(row), "r"(plane)
      : "memory");
}
__device__ __forceinline__ void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until at most kPending of this thread's stores still read shared memory.
template <int kPending>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Until at most kPending of this thread's stores are incomplete.
template <int kPending>
__device__ __forceinline__ void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace pixelfly::device
