// Launching product_sm80 for one dtype: included by one small file per dtype.
#pragma once

#include "kernels/product_sm80.cuh"
#include "launch/launch_kernel.h"
#include "launch/product_sm80.h"

namespace pixelfly::sm80 {

template <typename T, int kBlock, bool kTransposed>
Status launch_one(const ProductArgs& args, Stream stream) {
  using S = ProductShape<T, kBlock>;
  const int64_t token_tiles = (args.p.tokens + kProductTokens - 1) / kProductTokens;
  const int64_t grid = token_tiles * args.out_tiles;
  if (grid > INT32_MAX) return Status::unsupported("product_sm80: more than 2^31 output tiles");
  return launch_kernel(product_sm80<T, kBlock, kTransposed>, static_cast<unsigned>(grid),
                       S::kThreads, S::kSharedBytes, stream, args);
}

template <typename T, int kBlock>
Status launch_block(const ProductArgs& args, Stream stream) {
  return args.p.transposed ? launch_one<T, kBlock, true>(args, stream)
                           : launch_one<T, kBlock, false>(args, stream);
}

template <typename T>
Status launch_dtype(const ProductArgs& args, Stream stream) {
  switch (args.block_size) {
    case 16: return launch_block<T, 16>(args, stream);
    case 32: return launch_block<T, 32>(args, stream);
    case 64: return launch_block<T, 64>(args, stream);
    case 128: return launch_block<T, 128>(args, stream);
    default: break;
  }
  return Status::unsupported("block_size must be 16, 32, 64 or 128, got " +
                             std::to_string(args.block_size));
}

}  // namespace pixelfly::sm80
