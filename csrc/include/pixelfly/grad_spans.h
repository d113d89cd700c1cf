// How many spans of tokens the Hopper weight-gradient kernel cuts its work into. The planner asks
// it too, to compare work lists.
#pragma once

#include <algorithm>
#include <cstdint>

namespace pixelfly {

constexpr int kGradTokens = 32;  // tokens a stage

struct GradLoad {
  int32_t chunks;
  int32_t outputs;  // of all chunks
  int32_t tiles;    // of dz, s, x and t, each once
  double step_ns;   // a stage of the slowest chunk
};

// Nanoseconds of a stage of a chunk that loads `tiles` tiles and holds `outputs` products: loads
// (L2 gives an SM 64 bytes a nanosecond), or shared memory, written by loads and read by wgmma
// (128 bytes a cycle). Measured on one H100, results/weight_grad_sm90_h100.json.
inline double grad_step_ns(double tiles, double outputs) {
  const double loads = 64 * tiles, shared = 20 * tiles + 32 * outputs;
  return std::max(loads, shared) + 0.15 * std::min(loads, shared);
}

// All chunks pass through the same span at the same time, so that L2 serves what several load.
// With more than one span, partial sums are written, and added by a second kernel.
inline double grad_time_ns(const GradLoad& load, int steps, int spans, int num_sms) {
  constexpr double kStartNs = 2000, kReduceNs = 3000, kPartialNs = 10.5, kMemoryBytesPerNs = 2900;
  const int waves = (load.chunks * spans + num_sms - 1) / num_sms;
  const double stage_bytes = kGradTokens * 64 * 2;
  const double loop = waves * ((steps + spans - 1) / spans) * load.step_ns;
  const double memory = load.tiles * stage_bytes * steps / kMemoryBytesPerNs;
  const double partial = spans > 1 ? kReduceNs + kPartialNs * spans * load.outputs : 0;
  return std::max(loop, memory) + waves * kStartNs + partial;
}

inline int choose_grad_spans(const GradLoad& load, int steps, int num_sms) {
  constexpr int kMinSteps = 8, kMaxSpans = 64;
  int best = 1;
  for (int spans = 2; spans <= kMaxSpans && steps / spans >= kMinSteps; ++spans) {
    if (grad_time_ns(load, steps, spans, num_sms) < grad_time_ns(load, steps, best, num_sms)) {
      best = spans;
    }
  }
  return best;
}

}  // namespace pixelfly
