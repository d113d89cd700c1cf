// Runs reduce_weight_grad_sm90 on the emulator (emulator/machine.h): sums of spans of dB and dbias,
// with one of an output's slices in a thread block and with two, against plain sums. No GPU.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cuda_bf16.h"
#include "kernels/weight_grad_sm90.cuh"
#include "launch/launch_kernel.h"

namespace pixelfly {
namespace {

constexpr int kChunks = 3, kSpans = 3, kBlocks = 2 * 6 + 1 + 5;  // that the chunks below have

// Warpgroups of six, six, one, no, no and five outputs: blocks of 64 in order. Chunk c sums tile c
// of dz, in either warpgroup.
std::vector<GradChunk> make_chunks() {
  const int outputs[kChunks][2] = {{6, 6}, {1, 0}, {0, 5}};
  std::vector<GradChunk> chunks(kChunks);
  int32_t block = 0;
  for (int c = 0; c < kChunks; ++c) {
    GradChunk& chunk = chunks[static_cast<size_t>(c)];
    chunk.num_tiles = 1;
    chunk.tile[0] = c << 2 | kGradDz;
    chunk.num_bias[c % 2] = 1;
    for (int w = 0; w < 2; ++w) {
      chunk.num_outputs[w] = outputs[c][w];
      for (int i = 0; i < outputs[c][w]; ++i) chunk.output[w][i] = kGradBlock + block++;
    }
  }
  return chunks;
}

// The value of a fragment's element: thread, slice and place give row and column (write_fragment).
struct Place {
  int row, col;
};
Place place_of(int value) {
  const int slice = value / 512, thread = value / 4 % 128, e = value % 4;
  return {thread / 32 * 16 + thread % 32 / 4 + e / 2 * 8, slice * 8 + thread % 4 * 2 + e % 2};
}

template <int kSlices>
int check() {
  const std::vector<GradChunk> chunks = make_chunks();
  std::mt19937 rng(7);
  std::normal_distribution<float> normal;
  constexpr int kSlots = kChunks * 2;
  std::vector<float> partial(size_t{kSpans} * kSlots * kGradOutputs * kGradPartial);
  std::vector<float> bias_partial(size_t{kSpans} * kSlots * kGradBias * 64);
  for (float& v : partial) v = normal(rng);
  for (float& v : bias_partial) v = normal(rng);
  std::vector<float> dblocks(size_t{kBlocks} * kGradPartial, NAN), dbias(kChunks * 64, NAN);
  GradKernelArgs args{};
  args.chunks = chunks.data();
  args.num_chunks = kChunks;
  args.spans = kSpans;
  args.block_parts = 1;
  args.out_features = kChunks * 64;
  args.dblocks = dblocks.data();
  args.dbias = dbias.data();
  args.float_out = true;
  args.partial = partial.data();
  args.bias_partial = bias_partial.data();
  const unsigned grid = kSlots * (kGradOutputs * 8 / kSlices + 1);
  const Status status = launch_kernel(reduce_weight_grad_sm90<__nv_bfloat16, kSlices>, dim3(grid),
                                      dim3(128), 0, nullptr, args);
  int failures = status.ok() ? 0 : 1;
  auto compare = [&](const char* what, int at, float got, float want) {
    if (got == want) return;
    if (++failures < 4) std::printf("FAILED %s %d: %.9g, not %.9g\n", what, at, got, want);
  };
  for (int slot = 0; slot < kSlots; ++slot) {
    const GradChunk& chunk = chunks[static_cast<size_t>(slot / 2)];
    for (int i = 0; i < chunk.num_outputs[slot % 2]; ++i) {
      const int block = chunk.output[slot % 2][i];
      for (int v = 0; v < kGradPartial; ++v) {
        float sum = 0;
        for (int s = 0; s < kSpans; ++s) {
          const int tile = (s * kSlots + slot) * kGradOutputs + i;
          sum += partial[static_cast<size_t>(tile * kGradPartial + v)];
        }
        const Place p = place_of(v);
        const int at = block * kGradPartial + p.row * 64 + p.col;
        compare("dB", at, dblocks[static_cast<size_t>(at)], sum);
      }
    }
    for (int v = 0; v < chunk.num_bias[slot % 2] * 64; ++v) {
      float sum = 0;
      for (int s = 0; s < kSpans; ++s) {
        sum += bias_partial[static_cast<size_t>((s * kSlots + slot) * kGradBias * 64 + v)];
      }
      const int at = slot / 2 * 64 + v;
      compare("dbias", at, dbias[static_cast<size_t>(at)], sum);
    }
  }
  return failures;
}

}  // namespace
}  // namespace pixelfly

int main() {
  const int failures = pixelfly::check<1>() + pixelfly::check<2>();
  std::printf("reduction of weight gradients: %d failures\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
