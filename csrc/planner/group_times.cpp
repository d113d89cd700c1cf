#include "planner/group_times.h"

#include <algorithm>

namespace pixelfly {
namespace {

// Time of the loads. A dense group's take as long as memory is slow: as many tiles of x as there
// are stages are under way at once.
double time_of_loads(const GroupWork& g, double load) {
  constexpr double kLatency = 8;
  // A row alone waits longer for x, the less of shared memory its weights leave to it.
  constexpr double kOfWeight = 0.02, kUsualWeights = 10;
  if (!g.dense && g.outputs == 1 && g.holds()) {
    return load * g.loads() * (1 + kOfWeight * (g.in_shared() - kUsualWeights));
  }
  if (!g.dense) return load * g.loads();
  const int32_t stages =
      std::min(g.stages, g.resident ? (kGroupRoom - g.in_shared()) / 2 : kGroupRoom / 4);
  return std::max(load * g.loads(), kLatency * g.x_tiles / stages);
}

}  // namespace

bool bound_by_loads(const std::vector<GroupWork>& groups) {
  double busy = 0, loads = 0;
  for (const GroupWork& g : groups) {
    busy += std::max<double>(g.weights, kLoad * g.loads());
    loads += kLoadAtLimit * g.loads();
  }
  return loads > busy;
}

double tile_time(const GroupWork& g, double load, bool saves_slopes) {
  // Of an output tile. Two warpgroups take turns: an epilogue runs beside the other's products.
  const double epilogue = saves_slopes ? 12 : 5.5;
  constexpr double kTurn = 1.5;
  const double work = std::max<double>(g.weights, time_of_loads(g, load)) + kTurn;
  return std::max(work, (g.weights + epilogue * g.outputs) / 2);
}

std::vector<double> tile_times(const std::vector<GroupWork>& groups, bool saves_slopes) {
  const double load = bound_by_loads(groups) ? kLoadAtLimit : kLoad;
  // Where the others' weights leave more of shared memory to x, a dense row waits longer for its
  // own (product_sm90_plans_h200.json, "registers_dense").
  constexpr double kBesideRegisters = 1.25;
  const bool alone =
      std::all_of(groups.begin(), groups.end(), [](const GroupWork& g) { return g.outputs == 1; });
  const bool registers = std::any_of(groups.begin(), groups.end(),
                                     [](const GroupWork& g) { return !g.dense && g.holds(); });
  std::vector<double> times;
  for (const GroupWork& g : groups) {
    const double time = tile_time(g, load, saves_slopes);
    if (g.dense && alone) {  // as traced (product_sm90_power_h200.json, "traces")
      times.push_back(tile_time(g, kLoad, saves_slopes));
    } else {
      times.push_back(g.dense && registers ? kBesideRegisters * time : time);
    }
  }
  return times;
}

GroupWork work_of(const std::vector<GroupStep>& steps, int32_t outputs, int32_t rank_tiles) {
  GroupWork work{};
  work.weights = rank_tiles * outputs;
  work.x_tiles = static_cast<int32_t>(steps.size()) + rank_tiles;
  work.outputs = outputs;
  for (const GroupStep& s : steps) work.weights += (s.weight[0] >= 0) + (s.weight[1] >= 0);
  return work;
}

void compare_groups(std::vector<GroupWork>& groups) {
  constexpr double kMany = 1.5;  // x tiles, times the mean
  constexpr int32_t kAhead = 3;  // of a token tile: what the others load further ahead delays it
  double x_tiles = 0;
  for (const GroupWork& g : groups) x_tiles += g.x_tiles;
  bool any_dense = false;
  for (GroupWork& g : groups) {
    g.dense = g.x_tiles * static_cast<double>(groups.size()) > kMany * x_tiles;
    any_dense |= g.dense;
  }
  for (GroupWork& g : groups) {
    g.stages =
        any_dense && !g.dense ? std::min(g.x_tiles + kAhead, kMaxGroupStages) : kMaxGroupStages;
    g.resident = g.in_shared() <= kGroupResidentTiles;
    if (!g.dense || !g.resident) continue;
    GroupWork streams = g;
    streams.resident = false;
    g.resident = time_of_loads(g, kLoad) <= time_of_loads(streams, kLoad);
  }
}

bool share_x(const std::vector<GroupWork>& groups) {
  constexpr double kMost = 1.6;  // products for a tile of x
  double weights = 0, x_tiles = 0;
  for (const GroupWork& g : groups) {
    if (g.dense) continue;
    weights += g.weights;
    x_tiles += g.x_tiles;
  }
  return weights > kMost * x_tiles;
}

}  // namespace pixelfly
