#include <cuda_runtime_api.h>

#include <array>
#include <mutex>

#include "pixelfly/launch.h"

namespace pixelfly {

Status device_info(int32_t device_index, DeviceInfo* out) {
  constexpr int kMaxDevices = 64;
  static std::array<DeviceInfo, kMaxDevices> cache;
  static std::mutex mutex;
  if (device_index < 0 || device_index >= kMaxDevices) {
    return Status::invalid("device index " + std::to_string(device_index) + " is out of range");
  }
  const std::lock_guard<std::mutex> lock(mutex);
  DeviceInfo& info = cache[static_cast<size_t>(device_index)];
  if (info.arch == 0) {
    auto get = [&](cudaDeviceAttr attribute, int* value) {
      return cudaDeviceGetAttribute(value, attribute, device_index);
    };
    int major = 0, minor = 0, sms = 0, shared = 0;
    for (cudaError_t error :
         {get(cudaDevAttrComputeCapabilityMajor, &major),
          get(cudaDevAttrComputeCapabilityMinor, &minor), get(cudaDevAttrMultiProcessorCount, &sms),
          get(cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared)}) {
      if (error != cudaSuccess) {
        return Status::cuda(std::string("cudaDeviceGetAttribute: ") + cudaGetErrorString(error));
      }
    }
    info = {device_index, 10 * major + minor, sms, shared};
  }
  *out = info;
  return Status::success();
}

}  // namespace pixelfly
