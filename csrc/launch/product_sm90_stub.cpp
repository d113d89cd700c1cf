#include "launch/product_sm90.h"

namespace pixelfly {

bool product_sm90_supports(const ProductParams&, const DeviceInfo&) { return false; }
Status launch_product_sm90(const ProductParams&, const DeviceInfo&, Stream) {
  return Status::unsupported("product_sm90 is not built");
}


}  // namespace pixelfly
