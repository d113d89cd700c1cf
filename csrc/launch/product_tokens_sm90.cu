#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "kernels/product_tokens_sm90.cuh"
#include "launch/cuda_status.h"
#include "launch/product_tokens_sm90.h"
#include "launch/tensor_map.h"

namespace pixelfly {
namespace {

constexpr int kSharedSlack = 1024 + sizeof(TokenShared);  // alignment of the first tile

const TokenSection& section_of(const ProductParams& p) {
  return p.transposed ? p.header->tokens_transposed : p.header->tokens_forward;
}

// Weight tiles that fit beside x and t; each warpgroup's ring gets its share.
int weight_slots(const ProductParams& p, const DeviceInfo& device) {
  const int fixed = section_of(p).num_x_tiles + (p.header->rank > 0 ? 1 : 0);
  return (device.max_shared_bytes - kSharedSlack) / kTokenTileBytes - fixed;
}

template <typename T, bool kTransposed>
Status launch(const TokenMaps& maps, const TokenArgs& args, int grid, Stream stream) {
  auto kernel = product_tokens_sm90<T, kTransposed>;
  int tiles = args.section.num_x_tiles + (args.has_rank ? 1 : 0);
  for (int stages : args.stages) tiles += stages;
  const int bytes = tiles * kTokenTileBytes + 1024;
  PIXELFLY_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<grid, kTokenThreads, bytes, stream>>>(maps, args);
  PIXELFLY_CUDA(cudaGetLastError());
  return Status::success();
}

}  // namespace

bool product_tokens_sm90_supports(const ProductParams& p, const DeviceInfo& device) {
  if (device.arch != 90 || p.dtype == DType::kFloat32 || section_of(p).num_x_tiles == 0) {
    return false;
  }
  if (p.header->rank > 0 && p.factor_in == nullptr) return false;  // this kernel makes t itself
  if (p.z != nullptr && p.residual != nullptr) return false;       // one auxiliary tile at a time
  auto aligned = [](const void* pointer, int64_t stride) {
    return pointer == nullptr ||
           (reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride % 8 == 0);
  };
  return aligned(p.x, p.x_stride) && aligned(p.blocks, 0) &&
         aligned(p.factor_in, p.factor_in_stride) && aligned(p.factor, p.factor_stride) &&
         aligned(p.t, p.t_stride) && aligned(p.residual, p.residual_stride) &&
         aligned(p.z, p.z_stride) && aligned(p.y, p.y_stride) &&
         aligned(p.preact, p.preact_stride) && weight_slots(p, device) >= 3 * kTokenWarpgroups;
}

Status launch_product_tokens_sm90(const ProductParams& p, const DeviceInfo& device, Stream stream) {
  if (p.tokens == 0) return Status::success();
  const PlanHeader& h = *p.header;
  TokenMaps maps;
  auto map = [&](CUtensorMap* out, const void* data, int64_t rows, int64_t cols, int64_t stride) {
    // Absent operands get x's map: it is never used, but must be a valid parameter.
    if (data == nullptr)
      return encode_tile_map(out, p.dtype, p.x, p.tokens, p.in_features, p.x_stride);
    return encode_tile_map(out, p.dtype, data, rows, cols, stride);
  };
  const int64_t b = h.block_size;
  const int64_t in_rows = p.transposed ? p.in_features : h.rank;
  const int64_t in_cols = p.transposed ? h.rank : p.in_features;
  const int64_t out_rows = p.transposed ? h.rank : p.out_features;
  const int64_t out_cols = p.transposed ? p.out_features : h.rank;
  const void* aux = p.residual != nullptr ? p.residual : p.z;
  const int64_t aux_stride = p.residual != nullptr ? p.residual_stride : p.z_stride;
  PIXELFLY_RETURN_IF_ERROR(map(&maps.x, p.x, p.tokens, p.in_features, p.x_stride));
  PIXELFLY_RETURN_IF_ERROR(map(&maps.blocks, h.nnz ? p.blocks : nullptr, h.nnz * b, b, b));
  PIXELFLY_RETURN_IF_ERROR(map(&maps.factor_in, p.factor_in, in_rows, in_cols, p.factor_in_stride));
  PIXELFLY_RETURN_IF_ERROR(map(&maps.factor_out, p.factor, out_rows, out_cols, p.factor_stride));
  PIXELFLY_RETURN_IF_ERROR(map(&maps.t, p.t, p.tokens, h.rank, p.t_stride));
  PIXELFLY_RETURN_IF_ERROR(map(&maps.y, p.y, p.tokens, p.out_features, p.y_stride));
  PIXELFLY_RETURN_IF_ERROR(map(&maps.preact, p.preact, p.tokens, p.out_features, p.preact_stride));
  PIXELFLY_RETURN_IF_ERROR(map(&maps.aux, aux, p.tokens, p.out_features, aux_stride));

  TokenArgs args{};
  args.section = section_of(p);
  args.plan = p.plan;
  args.bias = p.bias;
  args.token_tiles = static_cast<int32_t>((p.tokens + kTokenTile - 1) / kTokenTile);
  args.out_features = p.out_features;
  args.activation = p.activation;
  args.has_rank = h.rank > 0;
  args.has_preact = p.preact != nullptr;
  args.has_residual = p.residual != nullptr;
  args.has_z = p.z != nullptr;

  const int grid = std::min(args.token_tiles, device.num_sms);
  const int slots = weight_slots(p, device);
  for (int w = 0; w < kTokenWarpgroups; ++w) {
    const int share = slots / kTokenWarpgroups + (w < slots % kTokenWarpgroups ? 1 : 0);
    args.stages[w] = std::min(share, kMaxTokenStages);
  }
  if (p.dtype == DType::kBFloat16) {
    return p.transposed ? launch<__nv_bfloat16, true>(maps, args, grid, stream)
                        : launch<__nv_bfloat16, false>(maps, args, grid, stream);
  }
  return p.transposed ? launch<__half, true>(maps, args, grid, stream)
                      : launch<__half, false>(maps, args, grid, stream);
}

}  // namespace pixelfly
