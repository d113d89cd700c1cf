// Turning CUDA's error codes into Status.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "pixelfly/status.h"

#define PIXELFLY_CUDA(call)                                                                  \
  do {                                                                                       \
    const cudaError_t error_ = (call);                                                       \
    if (error_ != cudaSuccess) {                                                             \
      return ::pixelfly::Status::cuda(std::string(#call ": ") + cudaGetErrorString(error_)); \
    }                                                                                        \
  } while (0)

#define PIXELFLY_RETURN_IF_ERROR(call)   \
  do {                                   \
    ::pixelfly::Status status_ = (call); \
    if (!status_.ok()) return status_;   \
  } while (0)
