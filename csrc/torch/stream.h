// The current CUDA stream of torch.
//
// libtorch_cuda is loaded privately by torch, so a link-time reference would either tie this
// library to CUDA builds of torch or stay unresolved: look the function up at first use.
#pragma once

#include "pixelfly/launch.h"

namespace pixelfly {

Stream current_stream(int32_t device_index);

}  // namespace pixelfly
