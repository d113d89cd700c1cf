// The one place that starts kernels.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

#include "launch/cuda_status.h"
#include "pixelfly/launch.h"

namespace pixelfly {

// Raises a kernel's limit of dynamic shared memory on the current device where it is too low. The
// runtime is asked once, not at every launch.
inline Status allow_shared_bytes(const void* kernel, int bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> limits;
  int device = 0;
  PIXELFLY_CUDA(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  int& limit = limits[{kernel, device}];
  if (bytes > limit) {
    PIXELFLY_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    limit = bytes;
  }
  return Status::success();
}

template <typename... Parameters>
Status allow_dynamic_shared(void (*kernel)(Parameters...), int bytes) {
  constexpr int kDefaultLimit = 48 * 1024;
  if (bytes <= kDefaultLimit) return Status::success();
  return allow_shared_bytes(reinterpret_cast<const void*>(kernel), bytes);
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

// The same for a kernel that calls wait_for_previous_kernel(), sm_90 or later
// (device/dependent_launch).
template <typename... Parameters, typename... Arguments>
Status launch_dependent_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 threads,
                               int shared_bytes, Stream stream, const Arguments&... arguments) {
  PIXELFLY_RETURN_IF_ERROR(allow_dynamic_shared(kernel, shared_bytes));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  PIXELFLY_CUDA(cudaLaunchKernelEx(&config, kernel, arguments...));
  return Status::success();
}

}  // namespace pixelfly
