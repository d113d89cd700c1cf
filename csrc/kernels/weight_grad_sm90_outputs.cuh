// What weight_grad_sm90 is given, and where its sums go: the workspace, or the gradients.
#pragma once

#include "device/convert.cuh"
#include "device/shared_memory.cuh"
#include "pixelfly/params.h"

namespace pixelfly {

constexpr int kGradPartial = 64 * 64;     // fp32 values of an output tile
constexpr int kGradSharedFragment = 129;  // four values of each of 128 threads, and four of padding

struct GradKernelArgs {
  const GradChunk* chunks;  // device
  int32_t num_chunks, spans;
  int32_t span_steps;  // stages of kGradTokens tokens in a span
  int32_t total_steps;
  int32_t block_parts;     // block_size / 64
  const GroupQuad* quads;  // device; b = 32 only, else null
  int32_t out_features, in_features, rank, rank_tiles;
  void *dblocks, *du, *dv, *dbias;
  bool float_out;       // gradients are fp32 instead of T
  bool early_start;     // the next kernel may be placed meanwhile
  float* partial;       // [span][chunk][warpgroup][output][64 * 64]
  float* bias_partial;  // [span][chunk][warpgroup][kGradBias][64]
  int32_t dz_tiles;     // in each of dz's matrices
};

namespace grad {

// Where an output tile goes.
struct Destination {
  void* base = nullptr;
  int64_t offset = 0, stride = 0;
  int rows = 0, cols = 0;           // of the tile's 64 each, what the gradient has; perhaps more
  const GroupQuad* quad = nullptr;  // b = 32: four blocks, each with a place of its own

  __device__ Destination(const GradKernelArgs& args, int output) {
    const int index = output & kGradIndexMask;
    if (output < kGradDu) {
      if (args.dblocks == nullptr) return;
      base = args.dblocks;
      rows = cols = 64;
      if (args.quads != nullptr) {
        quad = args.quads + index;
        return;
      }
      const int parts = args.block_parts;
      stride = 64 * parts;
      offset = (index / (parts * parts) * stride + index / parts % parts * 64) * stride +
               index % parts * 64;
      return;
    }
    const bool is_du = output < kGradDv;
    base = is_du ? args.du : args.dv;
    if (base == nullptr) return;
    const int feature = index / args.rank_tiles * 64, rank = index % args.rank_tiles * 64;
    const int features = (is_du ? args.out_features : args.in_features) - feature;
    stride = is_du ? args.rank : args.in_features;
    offset = is_du ? feature * stride + rank : rank * stride + feature;
    rows = is_du ? features : args.rank - rank;
    cols = is_du ? args.rank - rank : features;
  }
  // An element's place from the base on; -1: the gradient has no such element.
  __device__ __forceinline__ int64_t at(int row, int col) const {
    if (row >= rows || col >= cols) return -1;
    if (quad == nullptr) return offset + row * stride + col;
    const int64_t block = __ldg(&quad->block[col / 32 * 2 + row / 32]);
    return block < 0 ? -1 : (block * 32 + row % 32) * 32 + col % 32;
  }
};

// Writes accumulator fragment j (four values) of a warpgroup thread.
template <typename T>
__device__ __forceinline__ void write_fragment(const GradKernelArgs& args, const Destination& to,
                                               int thread, int j, float4 v) {
  const int row = thread / 32 * 16 + thread % 32 / 4, col = j * 8 + thread % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float a = half == 0 ? v.x : v.z, b = half == 0 ? v.y : v.w;
    const int64_t at = to.at(row + half * 8, col);
    if (at < 0) continue;
    if (args.float_out) {
      *reinterpret_cast<float2*>(static_cast<float*>(to.base) + at) = make_float2(a, b);
    } else {
      *reinterpret_cast<uint32_t*>(static_cast<T*>(to.base) + at) = device::pack2<T>(a, b);
    }
  }
}

// Writes eight neighbouring values of a row, from a multiple of eight on. Gradients have multiples
// of eight columns: all of them, or none.
template <typename T>
__device__ __forceinline__ void write_eight(const GradKernelArgs& args, const Destination& to,
                                            int row, int col, const float (&v)[8]) {
  const int64_t at = to.at(row, col);
  if (at < 0) return;
  if (args.float_out) {
    auto* out = reinterpret_cast<float4*>(static_cast<float*>(to.base) + at);
    out[0] = make_float4(v[0], v[1], v[2], v[3]);
    out[1] = make_float4(v[4], v[5], v[6], v[7]);
  } else {
    *reinterpret_cast<uint4*>(static_cast<T*>(to.base) + at) =
        uint4{device::pack2<T>(v[0], v[1]), device::pack2<T>(v[2], v[3]),
              device::pack2<T>(v[4], v[5]), device::pack2<T>(v[6], v[7])};
  }
}

template <typename T>
__device__ __forceinline__ void write_bias(const GradKernelArgs& args, const GradChunk& chunk,
                                           int warpgroup, int i, int feature, float sum) {
  const int n = (chunk.tile[chunk.bias[warpgroup][i]] >> 2) * 64 + feature;
  if (args.dbias == nullptr || n >= args.out_features) return;
  if (args.float_out) {
    static_cast<float*>(args.dbias)[n] = sum;
  } else {
    static_cast<T*>(args.dbias)[n] = device::from_float<T>(sum);
  }
}

// A warpgroup's sums in fragment order: in the workspace or, with one span, in shared memory. There
// fragments lie a little apart, for whoever reads several of a row.
struct Fragments {
  float4* of_thread;  // this thread's first one
  int stride;         // from a fragment to the next, 8 of an output, which follow each other

  __device__ Fragments(const GradKernelArgs& args, int warpgroup, int span, int chunk_index) {
    const int64_t slot =
        args.spans == 1
            ? warpgroup
            : (static_cast<int64_t>(span) * args.num_chunks + chunk_index) * 2 + warpgroup;
    auto* all = reinterpret_cast<float4*>(args.spans == 1 ? device::dynamic_shared()
                                                          : static_cast<void*>(args.partial));
    stride = args.spans == 1 ? kGradSharedFragment : kGradPartial / 32;
    of_thread = all + slot * kGradOutputs * 8 * stride + threadIdx.x % 128;
  }
};

// Writes a warpgroup's gradients from its sums in shared memory, of each output the rows whose sums
// the same warp had: eight values of two rows come from the same fragment of four threads. A loop,
// as unrolled with the accumulators in registers it takes most of the kernel's code.
template <typename T>
__device__ void write_outputs(const GradChunk& chunk, const GradKernelArgs& args, int warpgroup) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  const Fragments sums(args, warpgroup, 0, 0);
  const float4* from = sums.of_thread - lane;
  __syncwarp();
#pragma unroll 1
  for (int i = 0; i < chunk.num_outputs[warpgroup]; ++i, from += 8 * sums.stride) {
    const Destination to(args, chunk.output[warpgroup][i]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = lane % 8, row = lane / 8 + half * 4;
      float upper[8], lower[8];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float4 v = from[j * sums.stride + row * 4 + q];
        upper[2 * q] = v.x;
        upper[2 * q + 1] = v.y;
        lower[2 * q] = v.z;
        lower[2 * q + 1] = v.w;
      }
      write_eight<T>(args, to, warp * 16 + row, j * 8, upper);
      write_eight<T>(args, to, warp * 16 + row + 8, j * 8, lower);
    }
  }
}

}  // namespace grad

}  // namespace pixelfly
