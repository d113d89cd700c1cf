// The one place that starts kernels.
#pragma once

#include <cuda_runtime.h>

#include "launch/cuda_status.h"
#include "pixelfly/launch.h"

namespace pixelfly {

// Starts `kernel` with `shared_bytes` of dynamic shared memory, after raising its limit.
template <typename... Parameters, typename... Arguments>
Status launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 threads, int shared_bytes,
                     Stream stream, const Arguments&... arguments) {
  constexpr int kDefaultLimit = 48 * 1024;
  if (shared_bytes > kDefaultLimit) {
    PIXELFLY_CUDA(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  kernel<<<grid, threads, static_cast<size_t>(shared_bytes), stream>>>(arguments...);
  PIXELFLY_CUDA(cudaGetLastError());
  return Status::success();
}

}  // namespace pixelfly
