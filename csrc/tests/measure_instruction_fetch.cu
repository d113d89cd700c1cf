// Cycles an instruction of straight lines of code of a length, where warps run together and where
// they start apart in time, so that each has a stream of instructions of its own.
//
//   nvcc -O1 -gencode arch=compute_90a,code=sm_90a csrc/tests/measure_instruction_fetch.cu
//        -o measure_instruction_fetch
#include <cuda_runtime.h>

#include <cstdio>

constexpr int kRegisters = 16, kWarmup = 2;

template <int kInstructions>
__global__ void straight_line(float* out, float a, int* cycles, int loops, int skew) {
  float values[kRegisters];
  for (int i = 0; i < kRegisters; ++i) values[i] = static_cast<float>(threadIdx.x + i);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const long long start = clock64() + warp * skew;
  while (clock64() < start) {
  }
  long long begin = 0;
#pragma unroll 1
  for (int l = 0; l < loops; ++l) {
    if (l == kWarmup) begin = clock64();
#pragma unroll
    for (int i = 0; i < kInstructions; ++i) {
      values[i % kRegisters] = fmaf(values[i % kRegisters], a, a);
    }
  }
  const long long end = clock64();
  float sum = 0;
  for (float value : values) sum += value;
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  if (threadIdx.x % 32 == 0 && blockIdx.x == 0) cycles[warp] = static_cast<int>(end - begin);
}

template <int kInstructions>
void measure(float* out, int* cycles) {
  for (int skew : {0, 777}) {
    for (int warps : {1, 4, 8}) {
      const int loops = 42 * 512 / kInstructions + 3;
      for (int i = 0; i < 2; ++i) {  // the first one loads the code
        straight_line<kInstructions><<<132, warps * 32>>>(out, 1.0001f, cycles, loops, skew);
      }
      int taken[8];
      cudaMemcpy(taken, cycles, sizeof taken, cudaMemcpyDeviceToHost);
      const double instructions = double(loops - kWarmup) * kInstructions;
      std::printf("%6.1f KB, %d warps, %s: %.2f to %.2f cycles an instruction\n",
                  kInstructions / 64.0, warps, skew ? "apart" : "together", taken[0] / instructions,
                  taken[warps - 1] / instructions);
    }
  }
}

int main() {
  float* out;
  int* cycles;
  cudaMalloc(&out, 132 * 256 * sizeof(float));
  cudaMalloc(&cycles, 8 * sizeof(int));
  measure<64>(out, cycles);
  measure<256>(out, cycles);
  measure<1024>(out, cycles);
  measure<1536>(out, cycles);
  measure<3072>(out, cycles);
  measure<6144>(out, cycles);
  measure<12288>(out, cycles);
  const cudaError_t error = cudaDeviceSynchronize();
  std::printf("%s\n", cudaGetErrorString(error));
  return error != cudaSuccess;
}
