// A ring of stages between a producer and consumers.
#pragma once

#include <cstdint>

namespace pixelfly {

// Walks the ring: stage index and the parity of the phase that its next use completes.
struct Ring {
  int stages;
  int stage = 0;
  uint32_t phase = 0;
  __device__ void advance() {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
  __device__ void skip(int n) {
    stage += n;
    const int rounds = stage / stages;
    stage -= rounds * stages;
    phase ^= rounds & 1;
  }
  __device__ int before(int n) const { return stage >= n ? stage - n : stage - n + stages; }
};

}  // namespace pixelfly
