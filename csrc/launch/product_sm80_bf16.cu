#include "launch/product_sm80_impl.cuh"

namespace pixelfly::sm80 {

Status launch_product_bf16(const ProductArgs& args, Stream stream) {
  return launch_dtype<__nv_bfloat16>(args, stream);
}

}  // namespace pixelfly::sm80
