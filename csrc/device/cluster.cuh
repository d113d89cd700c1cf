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
// Writes to what lies at `address` in the shared memory of the cluster's thread block `block`.
__device__ __forceinline__ void store_shared_of(int block, uint32_t address, float4 v) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(there), "f"(v.x), "f"(v.y),
               "f"(v.z), "f"(v.w)
               : "memory");
}

}  // namespace pixelfly::device
