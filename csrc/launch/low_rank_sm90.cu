#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/low_rank_sm90.cuh"
#include "launch/alignment.h"
#include "launch/launch_kernel.h"
#include "launch/low_rank_sm90.h"
#include "launch/tensor_map.h"

namespace pixelfly {
namespace {

int tiles(int64_t n) { return static_cast<int>((n + kLowRankTile - 1) / kLowRankTile); }

template <typename T, bool kTransposed>
Status launch(const LowRankMaps& maps, const LowRankParams& p, Stream stream) {
  const dim3 grid(tiles(p.tokens), tiles(p.rank));
  return launch_kernel(low_rank_sm90<T, kTransposed>, grid, kLowRankThreads, kLowRankSharedBytes,
                       stream, maps, tiles(p.features));
}

}  // namespace

bool low_rank_sm90_supports(const LowRankParams& p, const DeviceInfo& device) {
  return device.arch == 90 && p.dtype != DType::kFloat32 &&
         aligned_rows(p.x, p.x_stride, p.dtype) &&
         aligned_rows(p.factor, p.factor_stride, p.dtype) && aligned_rows(p.t, p.t_stride, p.dtype);
}

Status launch_low_rank_sm90(const LowRankParams& p, const DeviceInfo&, Stream stream) {
  LowRankMaps maps;
  const int64_t rows = p.transposed ? p.features : p.rank;
  const int64_t cols = p.transposed ? p.rank : p.features;
  PIXELFLY_RETURN_IF_ERROR(
      encode_tile_map(&maps.x, p.dtype, p.x, p.tokens, p.features, p.x_stride));
  PIXELFLY_RETURN_IF_ERROR(
      encode_tile_map(&maps.factor, p.dtype, p.factor, rows, cols, p.factor_stride));
  PIXELFLY_RETURN_IF_ERROR(encode_tile_map(&maps.t, p.dtype, p.t, p.tokens, p.rank, p.t_stride));
  if (p.dtype == DType::kBFloat16) {
    return p.transposed ? launch<__nv_bfloat16, true>(maps, p, stream)
                        : launch<__nv_bfloat16, false>(maps, p, stream);
  }
  return p.transposed ? launch<__half, true>(maps, p, stream)
                      : launch<__half, false>(maps, p, stream);
}

}  // namespace pixelfly
