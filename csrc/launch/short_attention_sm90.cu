#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "kernels/short_attention_grad_sm90.cuh"
#include "launch/launch_kernel.h"
#include "launch/tensor_map.h"
#include "pixelfly/launch.h"

namespace pixelfly {
namespace {

int tiles_of(int tokens) { return (tokens + attention::kRows - 1) / attention::kRows; }

// The head's rows in boxes; `matrices`: 3 for qkv.
Status encode(CUtensorMap* map, DType dtype, const void* data, int samples, int tokens, int heads,
              int matrices) {
  return encode_plane_map(map, dtype, data, samples, tokens,
                          int64_t{matrices} * heads * kShortAttentionFeatures,
                          tiles_of(tokens) * attention::kRows, kShortAttentionFeatures);
}

template <typename P>
Status check(const P& p, const DeviceInfo& device) {
  if (!short_attention_supports(p.dtype, p.tokens, kShortAttentionFeatures, device)) {
    return Status::unsupported(
        "short attention wants a Hopper GPU, bfloat16 or float16, and at most " +
        std::to_string(kShortAttentionTokens) + " tokens");
  }
  if (!(p.scale > 0)) {
    return Status::unsupported("the scale of attention must be positive, got " +
                               std::to_string(p.scale));
  }
  constexpr int kMaxColumns = INT32_MAX / kShortAttentionFeatures;  // TMA's coordinates
  if (3 * int64_t{p.heads} > kMaxColumns || int64_t{p.samples} * p.heads > INT32_MAX / 2) {
    return Status::unsupported("too many heads in a call: " + std::to_string(p.samples) + " x " +
                               std::to_string(p.heads));
  }
  return Status::success();
}

// Persistent thread blocks, as many as stay on a multiprocessor by shared memory and, with
// `largest` threads in the largest of which one does, by registers.
unsigned grid_of(int problems, int threads, int largest, int shared_bytes,
                 const DeviceInfo& device) {
  constexpr int kReserved = 1024;  // what the system takes of each block's shared memory
  const int by_memory = (device.max_shared_bytes + kReserved) / (shared_bytes + kReserved);
  const int resident = std::max(1, std::min(by_memory, largest / threads));
  return static_cast<unsigned>(std::min<int>(problems, device.num_sms * resident));
}

template <typename T>
Status launch(const CUtensorMap& qkv, const ShortAttentionParams& p, const DeviceInfo& device,
              Stream stream) {
  const int tiles = tiles_of(p.tokens), problems = p.samples * p.heads;
  const int shared_bytes = 6 * tiles * attention::kTileBytes + 1024;
  const int threads = (tiles + attention::kWarpTiles - 1) / attention::kWarpTiles * 32;
  const unsigned grid = grid_of(problems, threads, kShortAttentionWarps * 32, shared_bytes, device);
  const ShortAttentionArgs args{p.tokens, p.heads, tiles, problems, p.scale, p.y, p.log_sum};
  return launch_kernel(short_attention_sm90<T>, grid, static_cast<unsigned>(threads), shared_bytes,
                       stream, qkv, args);
}

template <typename T>
Status launch_grad(const ShortAttentionGradMaps& maps, const ShortAttentionGradParams& p,
                   const DeviceInfo& device, Stream stream) {
  const int tiles = tiles_of(p.tokens), problems = p.samples * p.heads;
  const int shared_bytes = attention::grad_shared_bytes(tiles);
  const int threads = (p.tokens + kGradKeys - 1) / kGradKeys * 128;
  const unsigned grid =
      grid_of(problems, threads, kShortAttentionGradThreads, shared_bytes, device);
  const ShortAttentionGradArgs args{p.tokens, p.heads, tiles,     problems,
                                    p.scale,  p.y,     p.log_sum, p.dqkv};
  return launch_kernel(short_attention_grad_sm90<T>, grid, static_cast<unsigned>(threads),
                       shared_bytes, stream, maps, args);
}

}  // namespace

bool short_attention_supports(DType dtype, int64_t tokens, int64_t features,
                              const DeviceInfo& device) {
  return device.arch == 90 && (dtype == DType::kBFloat16 || dtype == DType::kFloat16) &&
         features == kShortAttentionFeatures && tokens <= kShortAttentionTokens;
}

Status launch_short_attention(const ShortAttentionParams& p, const DeviceInfo& device,
                              Stream stream) {
  PIXELFLY_RETURN_IF_ERROR(check(p, device));
  if (p.samples == 0 || p.tokens == 0 || p.heads == 0) return Status::success();
  CUtensorMap qkv;
  PIXELFLY_RETURN_IF_ERROR(encode(&qkv, p.dtype, p.qkv, p.samples, p.tokens, p.heads, 3));
  return p.dtype == DType::kBFloat16 ? launch<__nv_bfloat16>(qkv, p, device, stream)
                                     : launch<__half>(qkv, p, device, stream);
}

Status launch_short_attention_grad(const ShortAttentionGradParams& p, const DeviceInfo& device,
                                   Stream stream) {
  PIXELFLY_RETURN_IF_ERROR(check(p, device));
  if (p.samples == 0 || p.tokens == 0 || p.heads == 0) return Status::success();
  ShortAttentionGradMaps maps;
  PIXELFLY_RETURN_IF_ERROR(encode(&maps.qkv, p.dtype, p.qkv, p.samples, p.tokens, p.heads, 3));
  PIXELFLY_RETURN_IF_ERROR(encode(&maps.dy, p.dtype, p.dy, p.samples, p.tokens, p.heads, 1));
  return p.dtype == DType::kBFloat16 ? launch_grad<__nv_bfloat16>(maps, p, device, stream)
                                     : launch_grad<__half>(maps, p, device, stream);
}

}  // namespace pixelfly
