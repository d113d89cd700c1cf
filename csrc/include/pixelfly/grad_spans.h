// How many spans of tokens the Hopper weight-gradient kernel cuts its work into, by models of its
// time. The planner asks them too, to compare work lists.
//
// For many tokens the constants are fitted to 3,869 timings of 85 layouts on two H200s
// (weight_grad_sm90_cuts_h200.json, with the cuts chosen): the planner's cuts are there on average
// 2.4 and 2.6 % slower than the fastest timed, at most 17 %; with the constants before, fitted to
// an H100, 4.1 and 4.8 %, at most 30 %. For few tokens, to 348 timings of 45 layouts on one H200
// (few_tokens_h200.json): 4 % off on average.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pixelfly/schedule.h"

namespace pixelfly {

constexpr int kGradTokens = 32;                       // tokens a stage
constexpr int kGradTileBytes = kGradTokens * 64 * 2;  // a tile of a stage

// What the model knows of a work list.
struct GradLoad {
  int32_t chunks;
  int32_t outputs;                   // of all chunks
  int32_t tiles;                     // of dz, s, x and t, each once
  int32_t loads;                     // tiles, each as often as chunks load it
  double step_ns;                    // a stage of the slowest chunk
  double spread;                     // how much chunks differ, grad_spread()
  int32_t most_tiles, most_outputs;  // of a chunk
};

// A stage of a chunk that loads `tiles` tiles and holds `outputs` products: loads, or shared memory
// (written by loads, read by wgmma) with the products.
inline double grad_step_ns(double tiles, double outputs) {
  return std::max(44 * tiles, tiles + 39.5 * outputs);
}

// How chunks that pass through a span drift apart, from the standard deviation of their outputs
// relative to the mean, and the tiles that a chunk loads and no other does. Those come from memory
// at every stage, which keeps chunks together.
inline double grad_spread(double outputs, double own_tiles) {
  return 0.082 * outputs + 0.0107 * std::max(0., 1 - own_tiles);
}

inline double grad_many_time_ns(const GradLoad& load, int steps, int spans, int num_sms) {
  constexpr double kMemoryBytesPerNs = 3960, kL2Bytes = 25e6, kWaveNs = 2040, kPartialNs = 8.1;
  const int waves = (load.chunks * spans + num_sms - 1) / num_sms;
  const double loop = waves * ((steps + spans - 1) / spans) * load.step_ns;
  // L2 serves what several chunks load as long as they stay together; they drift apart the further
  // the more data there is.
  const double bytes = static_cast<double>(load.tiles) * kGradTileBytes * steps;
  const double missed = std::min(1., (load.spread + 0.0005 * (waves - 1)) * bytes / kL2Bytes);
  const double again = static_cast<double>(load.loads - load.tiles) * kGradTileBytes * steps;
  const double memory = (bytes + missed * again) / kMemoryBytesPerNs;
  // Sums of several spans are written, and added by a second kernel.
  const double partial = spans > 1 ? kPartialNs * spans * load.outputs : 0;
  return std::max(loop, memory) + 0.34 * std::min(loop, memory) + waves * kWaveNs + partial;
}

// Where L2 holds all tokens: a stage takes what its handshakes, its chunk's loads or products, or
// L2 for all thread blocks take, and sums leave the faster the fewer a thread block has.
inline double grad_few_time_ns(const GradLoad& load, int steps, int spans, int num_sms) {
  constexpr double kStageNs = 160, kTileNs = 50, kOutputNs = 40, kL2BytesPerNs = 8900;
  constexpr double kWaveNs = 3100, kStoreNs = 400, kReduceNs = 1800, kPartialNs = 6.4;
  const int waves = std::max(1, (load.chunks * spans + num_sms - 1) / num_sms);
  const double l2 =
      static_cast<double>(load.loads) * spans / waves * kGradTileBytes / kL2BytesPerNs;
  const double stage = std::max(
      {kStageNs, kTileNs * load.most_tiles, kOutputNs * load.most_outputs + load.most_tiles, l2});
  const double store = kStoreNs * load.most_outputs * (spans > 1 ? .5 : 1);
  const double partial = spans > 1 ? kReduceNs + kPartialNs * spans * load.outputs : 0;
  return kWaveNs + waves * ((steps + spans - 1) / spans * stage + store) + partial;
}

constexpr int kGradFewSteps = 256;  // fewer than 8192 tokens

// From so many outputs on, the sums of spans are added two slices of an output in a thread block:
// fitted (operator_experiments_h200.json, "reduction").
constexpr int kGradManyOutputs = 200;

inline double grad_time_ns(const GradLoad& load, int steps, int spans, int num_sms) {
  return steps < kGradFewSteps ? grad_few_time_ns(load, steps, spans, num_sms)
                               : grad_many_time_ns(load, steps, spans, num_sms);
}

inline int choose_grad_spans(const GradLoad& load, int steps, int num_sms) {
  constexpr int kMinSteps = 8, kMaxSpans = 64;
  constexpr int kMostWaves = 2;  // of several spans: more were timed rarely, and were slow
  int best = 1;
  double best_time = grad_time_ns(load, steps, 1, num_sms);
  for (int spans = 2; spans <= kMaxSpans && steps / spans >= kMinSteps; ++spans) {
    if (load.chunks * spans > kMostWaves * num_sms) break;
    const double time = grad_time_ns(load, steps, spans, num_sms);
    if (time < best_time) {
      best = spans;
      best_time = time;
    }
  }
  return best;
}

struct GradCut {
  const GradList* list;
  int spans;
};

// The list of chunks, and the number of spans, that the models expect to be fastest.
inline GradCut choose_grad_cut(const PlanHeader& h, int steps, int num_sms) {
  const GradSection& g = h.grad;
  const int32_t tiles = group_tiles(h.num_rows * h.block_size) +
                        group_tiles(h.num_cols * h.block_size) + 2 * group_tiles(h.rank);
  GradCut best{};
  double best_time = 0;
  for (const GradList* list : {&g.many, &g.few}) {
    if (list->num_chunks == 0 || (list == &g.few && steps >= kGradFewSteps)) continue;
    const GradLoad load{list->num_chunks, g.num_outputs,        tiles,
                        list->num_loads,  list->step_ps * 1e-3, list->spread_ppm * 1e-6,
                        list->most_tiles, list->most_outputs};
    const int spans = choose_grad_spans(load, steps, num_sms);
    const double time = grad_time_ns(load, steps, spans, num_sms);
    if (best.list == nullptr || time < best_time) {
      best = {list, spans};
      best_time = time;
    }
  }
  return best;
}

}  // namespace pixelfly
