// How fast thread blocks load from L2 when groups of them load the same tiles at the same moment.
//
//   nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -Icsrc -Icsrc/include
//        csrc/tests/measure_l2_phase.cu csrc/launch/tensor_map.cpp -o measure_l2_phase
#include <cuda.h>

#include <algorithm>
#include <cstdio>
#include <vector>

#include "device/mbarrier.cuh"
#include "device/shared_memory.cuh"
#include "device/tma.cuh"
#include "launch/tensor_map.h"
#include "tests/check_device.cuh"

using namespace pixelfly;

constexpr int kBlocks = 132, kStages = 8, kSteps = 800;
constexpr int kRows = 128, kCols = 64, kBytes = kRows * kCols * 2;
constexpr int kMatrixRows = 12288, kMatrixCols = 1024;  // 25 MB: stays in L2
constexpr int kTiles = kMatrixRows / kRows * (kMatrixCols / kCols);
constexpr int kSharedBytes = 1024 + kStages * kBytes;

__device__ uint32_t scrambled(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352d;
  x = (x ^ x >> 15) * 0x846ca68b;
  return x ^ x >> 16;
}

__global__ void __launch_bounds__(64, 1)
    load(const __grid_constant__ CUtensorMap map, bool neighbours, int size) {
  __shared__ uint64_t full[kStages], empty[kStages];
  const uint32_t ring = (device::smem_address(device::dynamic_shared()) + 1023) & ~1023u;
  const uint32_t full0 = device::smem_address(full), empty0 = device::smem_address(empty);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      device::mbarrier_init(full0 + s * 8, 1);
      device::mbarrier_init(empty0 + s * 8, 1);
    }
    device::mbarrier_init_fence();
  }
  __syncthreads();
  const uint32_t group = neighbours ? blockIdx.x / size : blockIdx.x % (kBlocks / size);
  for (int i = 0; i < kSteps; ++i) {
    const int s = i % kStages;
    const uint32_t phase = i / kStages & 1;
    if (threadIdx.x == 0) {
      const int tile = scrambled(group * 7919 + i) % kTiles;
      device::mbarrier_wait(empty0 + s * 8, phase ^ 1);
      device::mbarrier_expect_tx(full0 + s * 8, kBytes);
      device::tma_load_2d(ring + s * kBytes, &map, full0 + s * 8,
                          tile % (kMatrixCols / kCols) * kCols,
                          tile / (kMatrixCols / kCols) * kRows);
    } else if (threadIdx.x == 32) {
      device::mbarrier_wait(full0 + s * 8, phase);
      device::mbarrier_arrive(empty0 + s * 8);
    }
  }
}

int main() {
  void* x;
  CHECK_CUDA(cudaMalloc(&x, size_t{2} * kMatrixRows * kMatrixCols));
  CHECK_CUDA(cudaMemset(x, 0, size_t{2} * kMatrixRows * kMatrixCols));
  CUtensorMap map;
  const Status status = encode_tile_map(&map, DType::kBFloat16, x, kMatrixRows, kMatrixCols,
                                        kMatrixCols, kRows, kCols);
  if (!status.ok()) {
    std::printf("%s\n", status.message.c_str());
    return 1;
  }
  CHECK_CUDA(cudaFuncSetAttribute(load, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  for (const bool neighbours : {true, false}) {
    for (const int size : {1, 2, 4, 6, 12, 22, 66, 132}) {
      const float ms = time_graph(
          [&](int, cudaStream_t stream) {
            load<<<kBlocks, 64, kSharedBytes, stream>>>(map, neighbours, size);
          },
          4);
      std::printf("groups of %3d %s blocks: %.2f TB/s\n", size,
                  neighbours ? "neighbouring" : "distant",
                  double(kBlocks) * kSteps * kBytes / ms * 1e-9);
    }
  }
  CHECK_CUDA(cudaFree(x));
  return 0;
}
