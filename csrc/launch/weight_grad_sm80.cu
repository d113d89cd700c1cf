#include <algorithm>

#include "kernels/weight_grad_sm80.cuh"
#include "launch/alignment.h"
#include "launch/cuda_status.h"
#include "launch/weight_grad_sm80.h"

namespace pixelfly {
namespace sm80 {

Status launch_weight_grad_bf16(const GradArgs& args, int block_size, Stream stream);
Status launch_weight_grad_fp16(const GradArgs& args, int block_size, Stream stream);
Status launch_weight_grad_fp32(const GradArgs& args, int block_size, Stream stream);

namespace {

GradArgs make_args(const WeightGradParams& p, const DeviceInfo& device) {
  const PlanHeader& h = *p.header;
  GradArgs args{};
  args.p = p;
  args.p.header = nullptr;
  args.row_idx = p.plan + h.row_idx_offset;
  args.col_idx = p.plan + h.col_idx_offset;
  args.num_blocks = p.dblocks != nullptr ? h.nnz : 0;
  args.rank = h.rank;
  args.rank_tiles = h.rank_tiles;
  args.num_cols = h.num_cols;
  args.du_tiles = p.du != nullptr ? h.num_rows * h.rank_tiles : 0;
  args.dv_tiles = p.dv != nullptr ? h.num_cols * h.rank_tiles : 0;
  const int vec = static_cast<int>(16 / size_of(p.dtype));
  auto rows = [&](const void* data, int64_t stride, int64_t cols) {
    return aligned_rows(data, stride, p.dtype) && cols % vec == 0;
  };
  args.dz_vectors = rows(p.dz, p.dz_stride, p.out_features);
  args.x_vectors = rows(p.x, p.x_stride, p.in_features);
  args.t_vectors = rows(p.t, p.t_stride, h.rank);
  args.s_vectors = rows(p.s, p.s_stride, h.rank);
  // Enough thread blocks for about two waves of four per SM, spans of at least 256 tokens.
  const int64_t tiles = std::max(1, args.num_blocks + args.du_tiles + args.dv_tiles);
  const int64_t wanted = (8LL * device.num_sms + tiles - 1) / tiles;
  const int64_t most = std::max<int64_t>(1, p.tokens / 256);
  const int64_t spans = std::clamp<int64_t>(wanted, 1, most);
  args.span_tokens = ((p.tokens + spans - 1) / spans + 63) / 64 * 64;
  args.spans = static_cast<int32_t>((p.tokens + args.span_tokens - 1) / args.span_tokens);
  args.partial = static_cast<float*>(p.workspace);
  return args;
}

}  // namespace
}  // namespace sm80

size_t weight_grad_workspace_sm80(const WeightGradParams& p, const DeviceInfo& device) {
  if (p.tokens == 0) return 0;
  const sm80::GradArgs args = sm80::make_args(p, device);
  const int64_t tiles = int64_t{args.num_blocks} + args.du_tiles + args.dv_tiles;
  const int64_t b = p.header->block_size;
  const int64_t bias_spans = (p.tokens + sm80::kBiasRows - 1) / sm80::kBiasRows;
  const int64_t bias = p.dbias != nullptr ? bias_spans * p.out_features : 0;
  return static_cast<size_t>(std::max(args.spans * tiles * b * b, bias)) * sizeof(float);
}

Status launch_weight_grad_sm80(const WeightGradParams& p, const DeviceInfo& device, Stream stream) {
  const sm80::GradArgs args = sm80::make_args(p, device);
  switch (p.dtype) {
    case DType::kBFloat16: return sm80::launch_weight_grad_bf16(args, p.header->block_size, stream);
    case DType::kFloat16: return sm80::launch_weight_grad_fp16(args, p.header->block_size, stream);
    default: return sm80::launch_weight_grad_fp32(args, p.header->block_size, stream);
  }
}

}  // namespace pixelfly
