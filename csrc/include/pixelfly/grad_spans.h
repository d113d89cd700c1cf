// How many spans of tokens the Hopper weight-gradient kernel cuts its work into, by a model of its
// time. The planner asks the model too, to compare work lists.
//
// The constants are fitted to 1,573 timings of 19 layouts, each cut in many ways, on one H100
// (csrc/README.md): the cut that the model prefers was on average 1.3 % slower than the best.
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
  const double loads = 36 * tiles, products = 3.5 * tiles + 26 * outputs;
  return std::max(loads, products) + 0.1 * std::min(loads, products);
}

// From the standard deviations, relative to the means, of the chunks' tiles and outputs.
inline double grad_spread(double tiles, double outputs) { return 0.056 * tiles + 0.074 * outputs; }

inline double grad_time_ns(const GradLoad& load, int steps, int spans, int num_sms) {
  constexpr double kMemoryBytesPerNs = 3000, kL2Bytes = 25e6;
  constexpr double kWaveNs = 2050, kReduceNs = 2100, kPartialNs = 10.6;
  const int waves = (load.chunks * spans + num_sms - 1) / num_sms;
  const double loop = waves * ((steps + spans - 1) / spans) * load.step_ns;
  // All chunks pass through a span together, and L2 serves what several load, as long as they stay
  // together: chunks that differ drift apart, the further the more data there is.
  const double bytes = static_cast<double>(load.tiles) * kGradTileBytes * steps;
  const double missed =
      std::min(1., 0.017 + (load.spread + 0.0009 * (waves - 1)) * bytes / kL2Bytes);
  const double again = static_cast<double>(load.loads - load.tiles) * kGradTileBytes * steps;
  const double memory = (bytes + missed * again) / kMemoryBytesPerNs;
  // Sums of several spans are written, and added by a second kernel.
  const double partial = spans > 1 ? kReduceNs + kPartialNs * spans * load.outputs : 0;
  return std::max(loop, memory) + 0.32 * std::min(loop, memory) + waves * kWaveNs + partial;
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
