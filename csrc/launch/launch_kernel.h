// The one place that starts kernels.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

#include "launch/cuda_status.h"
#include "pixelfly/launch.h"

namespace pixelfly {

constexpr int kDefaultSharedLimit = 48 * 1024;

struct KernelFacts {
  int shared_limit = kDefaultSharedLimit;  // bytes of dynamic shared memory
  int ptx_version = 0;                     // what its code was compiled for: 90 for sm_90
};

// Raises a kernel's limit of dynamic shared memory on the current device where it is too low, and
// tells what is known of it there. The runtime is asked once, not at every launch.
inline Status prepare_kernel(const void* kernel, int shared_bytes, KernelFacts* facts) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, KernelFacts> known;
  int device = 0;
  PIXELFLY_CUDA(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  KernelFacts& found = known[{kernel, device}];
  if (found.ptx_version == 0) {
    cudaFuncAttributes attributes{};
    PIXELFLY_CUDA(cudaFuncGetAttributes(&attributes, kernel));
    found.ptx_version = attributes.ptxVersion;
  }
  if (shared_bytes > found.shared_limit) {
    PIXELFLY_CUDA(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    found.shared_limit = shared_bytes;
  }
  *facts = found;
  return Status::success();
}

template <typename... Parameters>
Status allow_dynamic_shared(void (*kernel)(Parameters...), int bytes) {
  if (bytes <= kDefaultSharedLimit) return Status::success();
  KernelFacts facts;
  return prepare_kernel(reinterpret_cast<const void*>(kernel), bytes, &facts);
}

// Starts `kernel` with `shared_bytes` of dynamic shared memory, after raising its limit.
template <typename... Parameters, typename... Arguments>
Status launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 threads, int shared_bytes,
                     Stream stream, const Arguments&... arguments) {
  PIXELFLY_RETURN_IF_ERROR(allow_dynamic_shared(kernel, shared_bytes));
  kernel<<<grid, threads, static_cast<size_t>(shared_bytes), stream>>>(arguments...);
  PIXELFLY_CUDA(cudaGetLastError());
  return Status::success();
}

// The same for a kernel that calls wait_for_previous_kernel() (device/dependent_launch) and was
// compiled for sm_90 or later. `cluster` thread blocks that follow each other in z form a cluster
// (device/cluster).
template <typename... Parameters, typename... Arguments>
Status launch_dependent_cluster(void (*kernel)(Parameters...), dim3 grid, int cluster, dim3 threads,
                                int shared_bytes, Stream stream, const Arguments&... arguments) {
  PIXELFLY_RETURN_IF_ERROR(allow_dynamic_shared(kernel, shared_bytes));
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = static_cast<unsigned>(cluster);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  PIXELFLY_CUDA(cudaLaunchKernelEx(&config, kernel, arguments...));
  return Status::success();
}

// The same without clusters.
template <typename... Parameters, typename... Arguments>
Status launch_dependent_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 threads,
                               int shared_bytes, Stream stream, const Arguments&... arguments) {
  return launch_dependent_cluster(kernel, grid, 1, threads, shared_bytes, stream, arguments...);
}

// The same for a kernel that older GPUs run too. Code for those, which a later GPU can compile for
// itself, does not wait.
template <typename... Parameters, typename... Arguments>
Status launch_dependent_if_it_waits(void (*kernel)(Parameters...), dim3 grid, dim3 threads,
                                    int shared_bytes, Stream stream,
                                    const Arguments&... arguments) {
  KernelFacts facts;
  PIXELFLY_RETURN_IF_ERROR(
      prepare_kernel(reinterpret_cast<const void*>(kernel), shared_bytes, &facts));
  return facts.ptx_version >= 90
             ? launch_dependent_kernel(kernel, grid, threads, shared_bytes, stream, arguments...)
             : launch_kernel(kernel, grid, threads, shared_bytes, stream, arguments...);
}

}  // namespace pixelfly
