#include "launch/product_sm80_impl.cuh"

namespace pixelfly::sm80 {

Status launch_product_fp32(const ProductArgs& args, Stream stream) {
  return launch_dtype<float>(args, stream);
}

}  // namespace pixelfly::sm80
