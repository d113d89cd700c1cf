// How many spans of tokens the Hopper weight-gradient kernel cuts its work into, by a model of its
// time. The planner asks the model too, to compare work lists.
//
// The constants are fitted to 1,603 timings of 30 layouts on one H100, 19 of them cut in many ways
// (benchmarks/results/weight_grad_sm90_cuts_h100.json): on those the cut that the model prefers was
// on average 3 % slower than the fastest measured, at most 12 %.
#pragma once

#include <algorithm>
#include <cstdint>

namespace pixelfly {

constexpr int kGradTokens = 32;                       // tokens a stage
constexpr int kGradTileBytes = kGradTokens * 64 * 2;  // a tile of a stage

// What the model knows of a work list.
struct GradLoad {
  int32_t chunks;
  int32_t outputs;  // of all chunks
  int32_t tiles;    // of dz, s, x and t, each once
  int32_t loads;    // tiles, each as often as chunks load it
  double step_ns;   // a stage of the slowest chunk
  double spread;    // how much chunks differ, grad_spread()
};

// A stage of a chunk that loads `tiles` tiles and holds `outputs` products: loads, or shared memory
// (written by loads, read by wgmma) with the products.
inline double grad_step_ns(double tiles, double outputs) {
  const double loads = 34 * tiles, products = tiles + 30.5 * outputs;
  return std::max(loads, products) + 0.03 * std::min(loads, products);
}

// How chunks that pass through a span drift apart, from the standard deviations of their tiles and
// outputs relative to the means, and the tiles that a chunk loads and no other does. Those come
// from memory at every stage, which keeps chunks together.
inline double grad_spread(double tiles, double outputs, double own_tiles) {
  return 0.055 * tiles + 0.046 * outputs + 0.009 * std::max(0., 1 - own_tiles);
}

inline double grad_time_ns(const GradLoad& load, int steps, int spans, int num_sms) {
  constexpr double kMemoryBytesPerNs = 3490, kL2Bytes = 25e6;
  constexpr double kWaveNs = 3150, kReduceNs = 1740, kPartialNs = 10.3;
  const int waves = (load.chunks * spans + num_sms - 1) / num_sms;
  const double loop = waves * ((steps + spans - 1) / spans) * load.step_ns;
  // L2 serves what several chunks load as long as they stay together; they drift apart the further
  // the more data there is.
  const double bytes = static_cast<double>(load.tiles) * kGradTileBytes * steps;
  const double missed =
      std::min(1., 0.04 + (load.spread + 0.0012 * (waves - 1)) * bytes / kL2Bytes);
  const double again = static_cast<double>(load.loads - load.tiles) * kGradTileBytes * steps;
  const double memory = (bytes + missed * again) / kMemoryBytesPerNs;
  // Sums of several spans are written, and added by a second kernel.
  const double partial = spans > 1 ? kReduceNs + kPartialNs * spans * load.outputs : 0;
  return std::max(loop, memory) + 0.44 * std::min(loop, memory) + waves * kWaveNs + partial;
}

inline int choose_grad_spans(const GradLoad& load, int steps, int num_sms) {
  constexpr int kMinSteps = 8, kMaxSpans = 64;
  int best = 1;
  double best_time = grad_time_ns(load, steps, 1, num_sms);
  for (int spans = 2; spans <= kMaxSpans && steps / spans >= kMinSteps; ++spans) {
    const double time = grad_time_ns(load, steps, spans, num_sms);
    if (time < best_time) {
      best = spans;
      best_time = time;
    }
  }
  return best;
}

}  // namespace pixelfly
