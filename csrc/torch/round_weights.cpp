// pixelfly::round_weights on CUDA: weights in a product's dtype, as they lie or in tiles.
#include <vector>

#include "torch/checks.h"
#include "torch/stream.h"

namespace pixelfly {
namespace {

constexpr const char* kOp = "pixelfly::round_weights";

std::vector<Tensor> round_weights(std::vector<Tensor> weights, ScalarType dtype, int64_t tile) {
  RoundWeightsParams p{};
  p.dtype = kernel_dtype(dtype, kOp, "dtype");
  STD_TORCH_CHECK(p.dtype != DType::kFloat32, kOp, ": dtype must be bfloat16 or float16");
  STD_TORCH_CHECK(tile >= 0 && tile <= 128 && tile % 8 == 0, kOp,
                  ": tile must be 0 or a multiple of 8 up to 128, got ", tile);
  std::vector<Tensor> results;
  if (weights.empty()) return results;
  results.reserve(weights.size());
  const int32_t index = weights[0].get_device_index();
  for (const Tensor& w : weights) {
    const DType source = dtype_of(w, kOp);
    STD_TORCH_CHECK(source == DType::kFloat32 || source == p.dtype, kOp,
                    ": weights must be float32 or have the given dtype");
    STD_TORCH_CHECK(w.is_cuda() && w.get_device_index() == index, kOp,
                    ": weights must be on one CUDA device");
    STD_TORCH_CHECK(w.is_contiguous(), kOp, ": weights must be contiguous");
  }

  const torch::stable::accelerator::DeviceGuard guard(index);
  const DeviceInfo device = device_of(weights[0], kOp);
  const Stream stream = current_stream(index);
  for (const Tensor& w : weights) {
    RoundedWeight& r = p.weights[p.count++];
    r = {};
    r.wide = dtype_of(w, kOp) == DType::kFloat32;
    if (tile > 0 && w.dim() == 2) {
      r.tile = static_cast<int32_t>(tile);
      r.rows = w.size(0);
      r.columns = w.size(1);
      const int64_t tiles = (r.rows + tile - 1) / tile * ((r.columns + tile - 1) / tile);
      results.push_back(empty(w, {tiles, tile, tile}, number_of(p.dtype)));
    } else {
      results.push_back(empty_beside(w, p.dtype));
    }
    r.size = results.back().numel();
    r.source = w.data_ptr();
    r.target = results.back().data_ptr();
    if (p.count == kMaxRoundedWeights || results.size() == weights.size()) {
      raise_if_error(launch_round_weights(p, device, stream), kOp);
      p.count = 0;
    }
  }
  return results;
}

}  // namespace
}  // namespace pixelfly

STABLE_TORCH_LIBRARY_IMPL(pixelfly, CUDA, m) {
  m.impl("round_weights", TORCH_BOX(&pixelfly::round_weights));
}
