#include "torch/stream.h"

#include <dlfcn.h>
#include <torch/headeronly/util/Exception.h>

namespace pixelfly {

Stream current_stream(int32_t device_index) {
  using Getter = int32_t (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    STD_TORCH_CHECK(library != nullptr, "pixelfly: this torch has no CUDA runtime loaded");
    void* symbol = dlsym(library, "aoti_torch_get_current_cuda_stream");
    STD_TORCH_CHECK(symbol != nullptr, "pixelfly: libtorch_cuda lacks the stable stream getter");
    return reinterpret_cast<Getter>(symbol);
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(device_index, &stream) == 0, "pixelfly: torch gave no current stream");
  return static_cast<Stream>(stream);
}

}  // namespace pixelfly
