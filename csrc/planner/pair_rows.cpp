#include "planner/pair_rows.h"

#include <algorithm>
#include <map>

#include "pixelfly/schedule.h"
#include "planner/plan.h"

namespace pixelfly {
namespace {

using Index = std::vector<int32_t>;

}  // namespace

// Pairs rows with equal columns first, then each remaining row with the one that shares the most
// columns with it (the nearest such row: its outputs lie close in memory). A row without a partner
// gets -1. At most kCandidates rows are looked at per column, so the time stays near-linear in the
// number of tiles.
Pairs pair_rows(const std::vector<Row>& rows, int32_t x_tiles) {
  constexpr size_t kCandidates = 64;
  const auto count = static_cast<int32_t>(rows.size());
  std::vector<int32_t> partner(rows.size(), -1);
  std::map<Index, int32_t> waiting;  // columns -> a row that has no partner so far
  for (int32_t i = 0; i < count; ++i) {
    Index columns;
    for (const Entry& e : rows[static_cast<size_t>(i)]) columns.push_back(e.x_tile);
    const auto [at, fresh] = waiting.try_emplace(std::move(columns), i);
    if (fresh) continue;
    partner[static_cast<size_t>(i)] = at->second;
    partner[static_cast<size_t>(at->second)] = i;
    waiting.erase(at);
  }

  std::vector<Index> users(static_cast<size_t>(x_tiles));  // rows without partner, by column
  for (int32_t i = count - 1; i >= 0; --i) {
    if (partner[static_cast<size_t>(i)] >= 0) continue;
    for (const Entry& e : rows[static_cast<size_t>(i)]) {
      users[static_cast<size_t>(e.x_tile)].push_back(i);
    }
  }
  Index shared(rows.size(), 0), touched;
  for (int32_t i = 0; i < count; ++i) {
    if (partner[static_cast<size_t>(i)] >= 0) continue;
    touched.clear();
    for (const Entry& e : rows[static_cast<size_t>(i)]) {
      auto& list = users[static_cast<size_t>(e.x_tile)];  // descending: the nearest come last
      while (!list.empty() &&
             (list.back() <= i || partner[static_cast<size_t>(list.back())] >= 0)) {
        list.pop_back();
      }
      const size_t first = list.size() > kCandidates ? list.size() - kCandidates : 0;
      for (size_t k = first; k < list.size(); ++k) {
        if (partner[static_cast<size_t>(list[k])] >= 0) continue;
        if (shared[static_cast<size_t>(list[k])]++ == 0) touched.push_back(list[k]);
      }
    }
    int32_t best = -1;
    for (int32_t j : touched) {
      const int32_t n = shared[static_cast<size_t>(j)];
      const int32_t most = best < 0 ? 0 : shared[static_cast<size_t>(best)];
      if (n > most || (n == most && j < best)) best = j;
    }
    for (int32_t j : touched) {
      if (j != best) shared[static_cast<size_t>(j)] = 0;
    }
    if (best < 0) continue;
    shared[static_cast<size_t>(best)] = 0;
    partner[static_cast<size_t>(i)] = best;
    partner[static_cast<size_t>(best)] = i;
  }

  // Rows that share nothing with anybody still halve the number of groups when put together.
  Pairs pairs;
  int32_t single = -1;
  for (int32_t i = 0; i < count; ++i) {
    const int32_t other = partner[static_cast<size_t>(i)];
    if (other > i) pairs.emplace_back(i, other);
    if (other >= 0) continue;
    if (single < 0) {
      single = i;
    } else {
      pairs.emplace_back(single, i);
      single = -1;
    }
  }
  if (single >= 0) pairs.emplace_back(single, -1);
  return pairs;
}

Parted part_pairs(const std::vector<Row>& rows, const Pairs& pairs, int32_t rank_tiles) {
  // Of a token tile, where weights stay in shared memory: two rows wait for tiles of x where their
  // weights leave room for few. Fitted to steps of forward and backward of square layers on an H200
  // (product_sm90_plans_h200.json, "steps"). Blocks alone in a forward that is repeated without a
  // pause are 1 to 7 % quicker with rows alone at other sizes too; the steps are not.
  constexpr double kTurn = 1.5, kLatency = 7.9, kAlone = 1.33, kWorthIt = 0.98;
  Parted parted{};
  for (const auto& [a, b] : pairs) {
    const Row& first = rows[static_cast<size_t>(a)];
    auto alone = [&](const Row& row) {
      return kAlone * (static_cast<double>(row.size()) + rank_tiles);
    };
    if (b < 0) {
      parted.pairs.emplace_back(a, b);
      parted.time += alone(first);
      parted.time_of_pairs += alone(first);
      continue;
    }
    const Row& second = rows[static_cast<size_t>(b)];
    size_t of_both = 0;
    for (size_t i = 0, j = 0; i < first.size() && j < second.size();) {
      const int32_t x = first[i].x_tile, other = second[j].x_tile;
      of_both += x == other;
      i += x <= other;
      j += other <= x;
    }
    const size_t weights = first.size() + second.size() + 2 * static_cast<size_t>(rank_tiles);
    const size_t x_tiles = first.size() + second.size() - of_both + static_cast<size_t>(rank_tiles);
    const int32_t stages = (kGroupRoom - static_cast<int32_t>(weights)) / 2;
    const bool resident = weights <= kGroupResidentTiles;
    const double arrival = resident ? kLatency * static_cast<double>(x_tiles) / stages : 0;
    const double together = std::max(static_cast<double>(weights) + kTurn, arrival);
    const double apart = alone(first) + alone(second);
    const bool part = apart < kWorthIt * arrival;
    parted.time += part ? apart : together;
    parted.time_of_pairs += together;
    parted.pairs.emplace_back(a, part ? -1 : b);
    if (part) parted.pairs.emplace_back(b, -1);
  }
  return parted;
}

}  // namespace pixelfly
