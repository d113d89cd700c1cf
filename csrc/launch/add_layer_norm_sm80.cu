#include "kernels/add_layer_norm.cuh"
#include "launch/launch_kernel.h"
#include "launch/layer_norm_types.h"
#include "pixelfly/launch.h"

namespace pixelfly {
namespace {

template <typename X, typename Narrow, int kThreads, int kValues>
Status launch(const AddLayerNormParams& p, Stream stream) {
  constexpr unsigned kRows = kThreads < 128 ? 128 / kThreads : 1;
  const int64_t grid = (p.tokens + kRows - 1) / kRows;
  if (grid > INT32_MAX) return Status::unsupported("more than 2^31 thread blocks");
  return launch_kernel(add_layer_norm<X, Narrow, kThreads, kValues>, static_cast<unsigned>(grid),
                       dim3(kThreads, kRows), 0, stream, p);
}

template <typename X, typename Narrow>
Status launch_types(const AddLayerNormParams& p, Stream stream) {
  if (p.features <= 256) return launch<X, Narrow, 32, 8>(p, stream);
  if (p.features <= 768) return launch<X, Narrow, 32, 24>(p, stream);
  if (p.features <= 1024) return launch<X, Narrow, 32, 32>(p, stream);
  if (p.features <= 2048) return launch<X, Narrow, 128, 16>(p, stream);
  if (p.features <= 4096) return launch<X, Narrow, 128, 32>(p, stream);
  return launch<X, Narrow, 512, 32>(p, stream);
}

}  // namespace

Status launch_add_layer_norm(const AddLayerNormParams& p, const DeviceInfo&, Stream stream) {
  PIXELFLY_RETURN_IF_ERROR(check_layer_norm(p));
  if (p.tokens == 0) return Status::success();
  const DType narrow = narrow_dtype(p.dtype, p.delta_dtype, p.y_dtype);
  return with_layer_norm_types(p.dtype, narrow, [&](auto x, auto beside) {
    return launch_types<decltype(x), decltype(beside)>(p, stream);
  });
}

}  // namespace pixelfly
