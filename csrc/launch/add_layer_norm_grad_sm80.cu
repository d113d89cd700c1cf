#include <algorithm>

#include "kernels/add_layer_norm_grad.cuh"
#include "launch/launch_kernel.h"
#include "launch/layer_norm_types.h"
#include "pixelfly/launch.h"

namespace pixelfly {
namespace {

// A warp a row as long as its registers hold the row and the sums: one thread block a
// multiprocessor then, which leaves one partial sum to reduce. Beyond that thread blocks of a row,
// several so that one reads while another meets at its barrier.
template <typename F>
auto with_shape(int features, F f) {
  if (features <= 256) return f(LayerNormGradShape<32, 8, 16, 2>{});
  if (features <= 768) return f(LayerNormGradShape<32, 24, 12, 1>{});
  if (features <= 1024) return f(LayerNormGradShape<32, 32, 8, 1>{});
  if (features <= 2048) return f(LayerNormGradShape<128, 16, 1, 4>{});
  if (features <= 4096) return f(LayerNormGradShape<256, 16, 1, 2>{});
  if (features <= 8192) return f(LayerNormGradShape<512, 16, 1, 1>{});
  return f(LayerNormGradShape<512, 32, 1, 1>{});
}

int64_t grid(const AddLayerNormGradParams& p, const DeviceInfo& device) {
  return with_shape(p.features, [&](auto shape) {
    using Shape = decltype(shape);
    return std::min<int64_t>((p.tokens + Shape::kRows - 1) / Shape::kRows,
                             int64_t{Shape::kBlocks} * device.num_sms);
  });
}

template <typename X, typename Narrow>
Status launch_types(const AddLayerNormGradParams& p, const DeviceInfo& device, Stream stream) {
  const int64_t parts = grid(p, device);
  if (parts > 0) {
    PIXELFLY_RETURN_IF_ERROR(with_shape(p.features, [&](auto shape) {
      using Shape = decltype(shape);
      return launch_kernel(add_layer_norm_grad<X, Narrow, Shape>, static_cast<unsigned>(parts),
                           dim3(Shape::kThreads, Shape::kRows), 0, stream, p);
    }));
  }
  if (p.dweight == nullptr) return Status::success();
  const dim3 blocks(static_cast<unsigned>((p.features + 31) / 32), 2);
  return launch_kernel(reduce_add_layer_norm_grad<X>, blocks, dim3(32, kPartSlices), 0, stream, p,
                       static_cast<int>(parts));
}

}  // namespace

size_t add_layer_norm_grad_workspace(const AddLayerNormGradParams& p, const DeviceInfo& device) {
  if (p.dweight == nullptr) return 0;
  return sizeof(float) * 2 * static_cast<size_t>(p.features * grid(p, device));
}

Status launch_add_layer_norm_grad(const AddLayerNormGradParams& p, const DeviceInfo& device,
                                  Stream stream) {
  PIXELFLY_RETURN_IF_ERROR(check_layer_norm(p));
  const DType narrow = narrow_dtype(p.dtype, p.delta_dtype, p.y_dtype);
  return with_layer_norm_types(p.dtype, narrow, [&](auto x, auto beside) {
    return launch_types<decltype(x), decltype(beside)>(p, device, stream);
  });
}

}  // namespace pixelfly
