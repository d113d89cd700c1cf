#include "kernels/weight_grad_sm90.cuh"
#include "launch/alignment.h"
#include "launch/early_start.h"
#include "launch/launch_kernel.h"
#include "launch/tensor_map.h"
#include "launch/weight_grad_sm90.h"
#include "pixelfly/grad_spans.h"

namespace pixelfly {
namespace {

GradKernelArgs make_args(const WeightGradParams& p, const DeviceInfo& device) {
  const PlanHeader& h = *p.header;
  GradKernelArgs args{};
  args.total_steps = static_cast<int32_t>((p.tokens + kGradTokens - 1) / kGradTokens);
  const auto [list, spans] = choose_grad_cut(h, args.total_steps, device.num_sms);
  args.chunks = reinterpret_cast<const GradChunk*>(p.plan + list->chunks_offset);
  args.num_chunks = list->num_chunks;
  args.span_steps = (args.total_steps + spans - 1) / spans;
  args.spans = (args.total_steps + args.span_steps - 1) / args.span_steps;
  args.dz_tiles = group_tiles(h.num_rows * h.block_size) / (p.dz_others.given() ? 3 : 1);
  args.block_parts = h.block_size / 64;
  if (h.block_size == 32) {
    args.quads = reinterpret_cast<const GroupQuad*>(p.plan + h.forward.quads_offset);
  }
  args.out_features = p.out_features;
  args.in_features = p.in_features;
  args.rank = h.rank;
  args.rank_tiles = (h.rank + 63) / 64;
  args.dblocks = p.dblocks;
  args.du = p.du;
  args.dv = p.dv;
  args.dbias = p.dbias;
  args.float_out = p.grad_dtype == DType::kFloat32;
  args.early_start = p.tokens <= kEarlyStartTokens;
  args.partial = static_cast<float*>(p.workspace);
  args.bias_partial =
      args.partial + int64_t{2} * args.num_chunks * args.spans * kGradOutputs * kGradPartial;
  return args;
}

template <typename T, int kSlices>
Status launch_reduction(const GradKernelArgs& args, Stream stream) {
  const auto grid = static_cast<unsigned>(args.num_chunks * 2 * (kGradOutputs * 8 / kSlices + 1));
  return launch_dependent_kernel(reduce_weight_grad_sm90<T, kSlices>, grid, 128, 0, stream, args);
}

template <typename T>
Status launch(const GradMaps& maps, const GradKernelArgs& args, int outputs, Stream stream) {
  const auto grid = static_cast<unsigned>(args.num_chunks * args.spans);
  PIXELFLY_RETURN_IF_ERROR(launch_dependent_kernel(weight_grad_sm90<T>, grid, kGradThreads,
                                                   kGradSharedBytes, stream, maps, args));
  if (args.spans == 1) return Status::success();
  return outputs < kGradManyOutputs ? launch_reduction<T, 1>(args, stream)
                                    : launch_reduction<T, 2>(args, stream);
}

}  // namespace

bool weight_grad_sm90_supports(const WeightGradParams& p, const DeviceInfo& device) {
  const PlanHeader& h = *p.header;
  if (device.arch != 90 || p.dtype == DType::kFloat32 || h.grad.many.num_chunks == 0) return false;
  if (h.rank % 8 != 0) return false;
  return aligned_rows(p.dz, p.dz_stride, p.dtype) &&
         aligned_thirds(p.dz_others, p.out_features, p.dtype) &&
         aligned_rows(p.x, p.x_stride, p.dtype) && aligned_rows(p.t, p.t_stride, p.dtype) &&
         aligned_rows(p.s, p.s_stride, p.dtype);
}

size_t weight_grad_workspace_sm90(const WeightGradParams& p, const DeviceInfo& device) {
  const GradKernelArgs args = make_args(p, device);
  if (args.spans == 1) return 0;
  const int64_t chunks = int64_t{args.num_chunks} * args.spans;
  return static_cast<size_t>(chunks * 2 * (kGradOutputs * kGradPartial + kGradBias * 64)) *
         sizeof(float);
}

Status launch_weight_grad_sm90(const WeightGradParams& p, const DeviceInfo& device, Stream stream) {
  const GradKernelArgs args = make_args(p, device);
  const int64_t rank = p.header->rank;
  const int outputs = p.header->grad.num_outputs;
  const int64_t dz_features = p.out_features / (p.dz_others.given() ? 3 : 1);
  GradMaps maps;
  // An operand that is not there (its gradient is not wanted) is replaced by dz: read, never
  // written.
  auto map = [&](CUtensorMap* out, const void* data, int64_t cols, int64_t stride) {
    if (data == nullptr) {
      data = p.dz;
      cols = dz_features;
      stride = p.dz_stride;
    }
    return encode_tile_map(out, p.dtype, data, p.tokens, cols, stride, kGradTokens);
  };
  PIXELFLY_RETURN_IF_ERROR(map(&maps.of[kGradDz], p.dz, dz_features, p.dz_stride));
  for (int i = 0; i < 2; ++i) {
    PIXELFLY_RETURN_IF_ERROR(
        map(&maps.of[kGradT + 1 + i], p.dz_others.data[i], dz_features, p.dz_others.stride[i]));
  }
  PIXELFLY_RETURN_IF_ERROR(map(&maps.of[kGradX], p.x, p.in_features, p.x_stride));
  PIXELFLY_RETURN_IF_ERROR(map(&maps.of[kGradT], p.t, rank, p.t_stride));
  PIXELFLY_RETURN_IF_ERROR(map(&maps.of[kGradS], p.s, rank, p.s_stride));
  return p.dtype == DType::kBFloat16 ? launch<__nv_bfloat16>(maps, args, outputs, stream)
                                     : launch<__half>(maps, args, outputs, stream);
}

}  // namespace pixelfly
