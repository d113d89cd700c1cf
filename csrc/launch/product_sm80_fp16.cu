#include "launch/product_sm80_impl.cuh"

namespace pixelfly::sm80 {

Status launch_product_fp16(const ProductArgs& args, Stream stream) {
  return launch_dtype<__half>(args, stream);
}

}  // namespace pixelfly::sm80
