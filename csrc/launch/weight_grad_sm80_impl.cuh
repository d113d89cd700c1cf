// Launching weight_grad_sm80 for one dtype: included by one small file per dtype.
#pragma once

#include "kernels/weight_grad_sm80.cuh"
#include "launch/launch_kernel.h"
#include "launch/weight_grad_sm80.h"

namespace pixelfly::sm80 {

template <typename T, int kBlock>
Status launch_grad_block(const GradArgs& args, Stream stream) {
  using S = GradShape<T, kBlock>;
  const int64_t tiles = int64_t{args.num_blocks} + args.du_tiles + args.dv_tiles;
  PIXELFLY_RETURN_IF_ERROR(launch_kernel(weight_grad_sm80<T, kBlock>,
                                         static_cast<unsigned>(tiles * args.spans), S::kThreads,
                                         S::kSharedBytes, stream, args));
  constexpr int kThreads = 256;
  const int64_t grid = (tiles * kBlock * kBlock + kThreads - 1) / kThreads;
  return launch_kernel(reduce_weight_grad_sm80<T, kBlock>, static_cast<unsigned>(grid), kThreads, 0,
                       stream, args);
}

template <typename T>
Status launch_bias_grad(const GradArgs& args, Stream stream) {
  const WeightGradParams& p = args.p;
  const auto spans = static_cast<unsigned>((p.tokens + kBiasRows - 1) / kBiasRows);
  if (spans > 65535) return Status::unsupported("dbias: more than 16.7 million tokens");
  float* partial = args.partial;  // after the tiles' partial sums were consumed
  const dim3 grid(static_cast<unsigned>((p.out_features + 31) / 32), spans);
  PIXELFLY_RETURN_IF_ERROR(launch_kernel(bias_grad_partial<T>, grid, dim3(32, 8), 0, stream,
                                         static_cast<const T*>(p.dz), p.dz_stride, p.tokens,
                                         p.out_features, partial));
  return launch_kernel(bias_grad_reduce<T>, static_cast<unsigned>((p.out_features + 127) / 128),
                       128, 0, stream, p, partial, static_cast<int>(spans));
}

template <typename T>
Status launch_grad_tiles(const GradArgs& args, int block_size, Stream stream) {
  switch (block_size) {
    case 16: return launch_grad_block<T, 16>(args, stream);
    case 32: return launch_grad_block<T, 32>(args, stream);
    case 64: return launch_grad_block<T, 64>(args, stream);
    case 128: return launch_grad_block<T, 128>(args, stream);
    default: break;
  }
  return Status::unsupported("block_size must be 16, 32, 64 or 128, got " +
                             std::to_string(block_size));
}

template <typename T>
Status launch_grad_dtype(const GradArgs& args, int block_size, Stream stream) {
  if (args.num_blocks + args.du_tiles + args.dv_tiles > 0) {
    PIXELFLY_RETURN_IF_ERROR(launch_grad_tiles<T>(args, block_size, stream));
  }
  return args.p.dbias != nullptr ? launch_bias_grad<T>(args, stream) : Status::success();
}

}  // namespace pixelfly::sm80
