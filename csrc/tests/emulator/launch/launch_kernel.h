// Starts kernels on the emulator; stands in for csrc/launch/launch_kernel.h.
#pragma once

#include <cuda_runtime.h>

#include "launch/cuda_status.h"
#include "pixelfly/launch.h"

namespace pixelfly {

template <typename... Parameters, typename... Arguments>
Status launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 threads, int shared_bytes,
                     Stream, const Arguments&... arguments) {
  emulator::launch({grid.x, grid.y, grid.z}, {threads.x, threads.y, threads.z},
                   static_cast<uint32_t>(shared_bytes), [&] { kernel(arguments...); });
  return Status::success();
}

template <typename... Parameters, typename... Arguments>
Status launch_dependent_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 threads,
                               int shared_bytes, Stream stream, const Arguments&... arguments) {
  return launch_kernel(kernel, grid, threads, shared_bytes, stream, arguments...);
}

template <typename... Parameters, typename... Arguments>
Status launch_dependent_cluster(void (*kernel)(Parameters...), dim3 grid, int cluster, dim3 threads,
                                int shared_bytes, Stream, const Arguments&... arguments) {
  emulator::launch(
      {grid.x, grid.y, grid.z}, {threads.x, threads.y, threads.z},
      static_cast<uint32_t>(shared_bytes), [&] { kernel(arguments...); },
      static_cast<unsigned>(cluster));
  return Status::success();
}

template <typename... Parameters, typename... Arguments>
Status launch_dependent_if_it_waits(void (*kernel)(Parameters...), dim3 grid, dim3 threads,
                                    int shared_bytes, Stream stream,
                                    const Arguments&... arguments) {
  return launch_kernel(kernel, grid, threads, shared_bytes, stream, arguments...);
}

}  // namespace pixelfly
