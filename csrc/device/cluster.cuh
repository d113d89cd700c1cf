// Thread blocks of a cluster, which run side by side and reach each other's shared memory.
#pragma once

#include <cstdint>

namespace pixelfly::device {

// Waits for all threads of the cluster but those that have ended; what they wrote to shared memory
// can then be read. All threads of a warp.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}
__device__ __forceinline__ uint32_t address_in(int block, uint32_t address) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
  return there;
}
// Writes to what lies at `address` in the shared memory of the cluster's thread block `block`.
__device__ __forceinline__ void store_shared_of(int block, uint32_t address, float4 v) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(address_in(block, address)),
               "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}
__device__ __forceinline__ void store_shared_of(int block, uint32_t address, uint32_t v) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address_in(block, address)), "r"(v)
               : "memory");
}
// Orders this thread's writes to the cluster's shared memory before later reads by TMA and wgmma.
__device__ __forceinline__ void fence_proxy_async_cluster() {
  asm volatile("fence.proxy.async;" ::: "memory");
}
// Arrives on that thread block's mbarrier. What was written to its shared memory before can be read
// by who waits for the phase with mbarrier_wait_cluster().
__device__ __forceinline__ void mbarrier_arrive_of(int block, uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                   address_in(block, barrier))
               : "memory");
}
__device__ __forceinline__ void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT_%=:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra WAIT_%=;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

}  // namespace pixelfly::device
