#include "launch/weight_grad_sm80_impl.cuh"

namespace pixelfly::sm80 {

Status launch_weight_grad_fp32(const GradArgs& args, int block_size, Stream stream) {
  return launch_grad_dtype<float>(args, block_size, stream);
}

}  // namespace pixelfly::sm80
