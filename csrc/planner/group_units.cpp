// Which thread block serves which row group for which tokens.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <iterator>
#include <numeric>
#include <queue>
#include <utility>
#include <vector>

#include "planner/group_times.h"
#include "planner/plan.h"

namespace pixelfly {
namespace {

using Index = std::vector<int32_t>;

// Token tiles of the longest of `lanes` lanes.
double lane_tiles(ListTokens tokens, int32_t lanes) {
  const double share = static_cast<double>(tokens.tiles) / lanes;
  return tokens.whole ? std::ceil(share) : share;
}

// How many lanes the token tiles of each group are cut into: `count` in all, each where the longest
// lane is. Lanes beyond what the slowest group needs are left out: they only load weights.
Index cut_lanes(const std::vector<double>& times, ListTokens tokens, int32_t count) {
  Index lanes(times.size(), 1);
  auto time = [&](size_t g, int32_t n) { return times[g] * lane_tiles(tokens, n); };
  auto shorter = [&](size_t a, size_t b) {
    const double x = time(a, lanes[a]), y = time(b, lanes[b]);
    return x != y ? x < y : a > b;
  };
  std::priority_queue<size_t, std::vector<size_t>, decltype(shorter)> longest(shorter);
  for (size_t g = 0; g < times.size(); ++g) longest.push(g);
  for (auto n = static_cast<int32_t>(times.size()); n < count; ++n) {
    const size_t g = longest.top();
    longest.pop();
    ++lanes[g];
    longest.push(g);
  }
  const double slowest = time(longest.top(), lanes[longest.top()]) * (1 + 1e-9);
  for (size_t g = 0; g < lanes.size(); ++g) {
    while (lanes[g] > 1 && time(g, lanes[g] - 1) <= slowest) --lanes[g];
  }
  return lanes;
}

// Of the longest one, with the weights that it loads first.
double lane_time(const GroupWork& g, double tile_time, ListTokens tokens, int32_t lanes) {
  return lane_tiles(tokens, lanes) * tile_time + (g.resident ? kLoad * g.weights : 0);
}

// The groups that each thread block serves, one after the other, and until when.
struct ThreadBlock {
  double busy = 0;
  Index groups;
};
using ThreadBlocks = std::vector<ThreadBlock>;

double longest(const ThreadBlocks& blocks) {
  double most = 0;
  for (const ThreadBlock& b : blocks) most = std::max(most, b.busy);
  return most;
}

size_t turns_of(const ThreadBlocks& blocks) {
  size_t turns = 0;
  for (const ThreadBlock& b : blocks) turns = std::max(turns, b.groups.size());
  return turns;
}

double mean_of(const ThreadBlocks& blocks) {
  double sum = 0;
  for (const ThreadBlock& b : blocks) sum += b.busy;
  return sum / static_cast<double>(blocks.size());
}

// Deals the lanes to the thread blocks, the longest first to the one that is free first; if `once`,
// among those that have none of them.
void deal_lanes(ThreadBlocks& blocks, const std::vector<GroupWork>& groups,
                const std::vector<double>& times, ListTokens tokens, const Index& lanes,
                int32_t first_group, bool once = false) {
  std::vector<std::pair<double, int32_t>> all;  // (time, group)
  for (size_t g = 0; g < groups.size(); ++g) {
    all.insert(
        all.end(), static_cast<size_t>(lanes[g]),
        {lane_time(groups[g], times[g], tokens, lanes[g]), first_group + static_cast<int32_t>(g)});
  }
  std::stable_sort(all.begin(), all.end(),
                   [](const auto& a, const auto& b) { return a.first > b.first; });
  using Free = std::pair<double, size_t>;  // (when, thread block)
  std::priority_queue<Free, std::vector<Free>, std::greater<>> queue;
  for (size_t i = 0; i < blocks.size(); ++i) queue.emplace(blocks[i].busy, i);
  for (const auto& [time, group] : all) {
    const size_t i = queue.top().second;
    queue.pop();
    blocks[i].busy += time;
    blocks[i].groups.push_back(group);
    if (!once) queue.emplace(blocks[i].busy, i);
  }
}

struct Balanced {
  ThreadBlocks blocks;
  double turning;  // what turns after the first cost
};

// 7 us: until a thread block has the weights of the next group.
constexpr double kOfTurn = 35;

// Spreads the groups' token tiles over the thread blocks so that these finish together: one lane
// for each, or a few shorter ones. Thread blocks that serve several groups in turn drift apart, and
// then no longer load the same x at the same moment: only a much better balance is worth that.
Balanced balance(const ThreadBlocks& before, const std::vector<GroupWork>& groups,
                 ListTokens tokens, int32_t first_group, bool saves_slopes) {
  // A turn costs part of a thread block's share of the work, as x is read again; where weights stay
  // and groups share what they read of x, the same whatever the share.
  const bool any_stays =
      std::any_of(groups.begin(), groups.end(), [](const GroupWork& g) { return g.resident; });
  const std::vector<double> times = tile_times(groups, saves_slopes);
  const auto count = static_cast<int32_t>(groups.size());
  const auto thread_blocks = static_cast<int32_t>(before.size());
  const double share =
      tokens.tiles * std::accumulate(times.begin(), times.end(), 0.0) / thread_blocks;
  const double turn_cost = !any_stays ? 0.2 * share : share_x(groups) ? kOfTurn : 0.3 * share;
  const int32_t fewest = (count + thread_blocks - 1) / thread_blocks;
  Balanced best{};
  double least = 0;
  for (int32_t turns = fewest; turns < fewest + 3; ++turns) {
    ThreadBlocks trial = before;
    const Index lanes = cut_lanes(times, tokens, turns * thread_blocks);
    deal_lanes(trial, groups, times, tokens, lanes, first_group);
    const double turning = turn_cost * (turns - 1), cost = longest(trial) + turning;
    if (best.blocks.empty() || cost < least) {
      least = cost;
      best = {std::move(trial), turning};
    }
  }
  return best;
}

Balanced spread(const std::vector<GroupWork>& groups, size_t together, int thread_blocks,
                ListTokens tokens, bool saves_slopes) {
  Balanced all{ThreadBlocks(static_cast<size_t>(thread_blocks)), 0};
  for (size_t begin = 0; begin < groups.size(); begin += together) {
    const size_t end = std::min(groups.size(), begin + together);
    Balanced part = balance(all.blocks,
                            {groups.begin() + static_cast<std::ptrdiff_t>(begin),
                             groups.begin() + static_cast<std::ptrdiff_t>(end)},
                            tokens, static_cast<int32_t>(begin), saves_slopes);
    all = {std::move(part.blocks), all.turning + part.turning};
  }
  return all;
}

// The first groups in one turn, each lane by a thread block of its own; the last `rest` of them
// after it, by all thread blocks that do not serve a dense row. Empty if there are too few.
ThreadBlocks spread_rest(const std::vector<GroupWork>& groups, size_t rest, int thread_blocks,
                         ListTokens tokens, bool saves_slopes) {
  // Of the second turn's tiles of x: thread blocks that load the same ones no longer do so at the
  // same moment (product_sm90_rest_h200.json, "traces").
  constexpr double kDrifted = 1.15;
  const auto first = static_cast<std::ptrdiff_t>(groups.size() - rest);
  const std::vector<GroupWork> most(groups.begin(), groups.begin() + first);
  if (most.size() > static_cast<size_t>(thread_blocks)) return {};
  std::vector<double> times = tile_times(groups, saves_slopes);
  for (size_t g = 0; g < groups.size(); ++g) {
    // As traced ("traces"; 20 us at 4096 x 4096): as if alone, and not beside registers.
    if (groups[g].dense) times[g] = tile_time(groups[g], kLoad, saves_slopes);
  }
  std::vector<double> times_of_rest(times.begin() + first, times.end());
  times.resize(most.size());
  for (double& time : times_of_rest) time *= kDrifted;

  ThreadBlocks blocks(static_cast<size_t>(thread_blocks));
  deal_lanes(blocks, most, times, tokens, cut_lanes(times, tokens, thread_blocks), 0);
  const auto others =
      std::stable_partition(blocks.begin(), blocks.end(), [&](const ThreadBlock& b) {
        return !b.groups.empty() && groups[static_cast<size_t>(b.groups[0])].dense;
      });
  ThreadBlocks later(others, blocks.end());
  if (later.size() < rest) return {};
  for (ThreadBlock& b : later) b.busy += kOfTurn;
  const Index lanes = cut_lanes(times_of_rest, tokens, static_cast<int32_t>(later.size()));
  deal_lanes(later, {groups.begin() + first, groups.end()}, times_of_rest, tokens, lanes,
             static_cast<int32_t>(most.size()), true);
  std::move(later.begin(), later.end(), others);
  return blocks;
}

// How long the slowest thread block is busy with so many token tiles, whatever they were dealt for.
double longest_with(const ThreadBlocks& blocks, const std::vector<GroupWork>& groups,
                    ListTokens tokens, bool saves_slopes) {
  const std::vector<double> times = tile_times(groups, saves_slopes);
  Index lanes(groups.size(), 0);
  for (const ThreadBlock& b : blocks) {
    for (int32_t g : b.groups) ++lanes[static_cast<size_t>(g)];
  }
  double most = 0;
  for (const ThreadBlock& b : blocks) {
    double busy = 0;
    for (int32_t group : b.groups) {
      const auto g = static_cast<size_t>(group);
      busy += lane_time(groups[g], times[g], tokens, lanes[g]);
    }
    most = std::max(most, busy);
  }
  return most;
}

// Thread blocks in the order of the share of the tokens where their first lane begins: neighbours
// start at the same moment and then load the same x.
ThreadBlocks in_token_order(const ThreadBlocks& blocks, size_t groups) {
  Index lanes(groups, 0), seen(groups, 0);
  for (const ThreadBlock& b : blocks) {
    if (!b.groups.empty()) ++lanes[static_cast<size_t>(b.groups[0])];
  }
  std::vector<std::pair<double, size_t>> order;
  for (size_t i = 0; i < blocks.size(); ++i) {
    double share = 1;
    if (!blocks[i].groups.empty()) {
      const auto g = static_cast<size_t>(blocks[i].groups[0]);
      share = static_cast<double>(seen[g]++) / lanes[g];
    }
    order.emplace_back(share, i);
  }
  auto group = [&](size_t i) { return blocks[i].groups.empty() ? 0 : blocks[i].groups[0]; };
  std::sort(order.begin(), order.end(), [&](const auto& a, const auto& b) {
    if (a.first != b.first) return a.first < b.first;
    return std::pair(group(a.second), a.second) < std::pair(group(b.second), b.second);
  });
  ThreadBlocks sorted;
  for (const auto& [share, i] : order) sorted.push_back(blocks[i]);
  return sorted;
}

// Unit `turn * blocks.size() + i` is what thread block i does in its turn. The lanes that a
// group has in a turn stride over a stretch of the tokens, in proportion to their number: in each
// turn all thread blocks then sweep about the same tokens, and x comes from memory once.
std::vector<GroupUnit> make_units(const ThreadBlocks& blocks,
                                  const std::vector<GroupWork>& groups) {
  const size_t turns = turns_of(blocks);
  Index all(groups.size(), 0);  // lanes of each group
  for (const ThreadBlock& b : blocks) {
    for (int32_t g : b.groups) ++all[static_cast<size_t>(g)];
  }
  const GroupUnit nothing{0, 0, 1, 0, 0, 0, 1, 0};
  std::vector<GroupUnit> units(turns * blocks.size(), nothing);
  Index done(groups.size(), 0);
  for (size_t turn = 0; turn < turns; ++turn) {
    Index now(groups.size(), 0);
    for (size_t i = 0; i < blocks.size(); ++i) {
      if (turn >= blocks[i].groups.size()) continue;
      const int32_t group = blocks[i].groups[turn];
      const auto g = static_cast<size_t>(group);
      const int32_t weights = groups[g].resident ? groups[g].in_shared() : kGroupStreams;
      units[turn * blocks.size() + i] = {group,   now[g]++, 0,      weights,
                                         done[g], 0,        all[g], groups[g].stages};
    }
    for (size_t i = 0; i < blocks.size(); ++i) {
      if (turn >= blocks[i].groups.size()) continue;
      GroupUnit& unit = units[turn * blocks.size() + i];
      unit.lanes = now[static_cast<size_t>(unit.group)];
      unit.end = unit.begin + unit.lanes;
    }
    for (size_t g = 0; g < done.size(); ++g) done[g] += now[g];
  }
  return units;
}

constexpr double kProductNs = 200;

// What choose_lanes() asks of a list that gives each group so many lanes, one of them dense.
LaneList describe(const std::vector<GroupWork>& groups, const std::vector<double>& times,
                  const Index& lanes) {
  LaneList list{};
  double most = 0;
  for (size_t g = 0; g < groups.size(); ++g) {
    if (groups[g].dense) {
      list.dense_lanes = lanes[g];
    } else if (times[g] / lanes[g] > most) {
      most = times[g] / lanes[g];
      list.other_lanes = lanes[g];
      list.other_ns = static_cast<int32_t>(kProductNs * times[g]);
    }
  }
  return list;
}

}  // namespace

Spread spread_groups(const std::vector<GroupWork>& groups, Order order, int thread_blocks,
                     ListTokens tokens, bool saves_slopes) {
  constexpr double kWorthIt = .95, kRestIsWorthIt = .97;
  Balanced best = spread(groups, order.together, thread_blocks, kAnyTokens, saves_slopes);
  double busy = longest(best.blocks) + best.turning;
  const double mean = mean_of(best.blocks);
  auto time = [&](const Balanced& b) {
    return longest_with(b.blocks, groups, tokens, saves_slopes) + b.turning;
  };
  if (tokens.whole) {
    Balanced own = spread(groups, order.together, thread_blocks, tokens, saves_slopes);
    if (turns_of(own.blocks) <= turns_of(best.blocks) + 1 && time(own) < kWorthIt * time(best)) {
      best = std::move(own);
    }
  }
  if (order.rest > 0) {
    ThreadBlocks in_turns = spread_rest(groups, order.rest, thread_blocks, tokens, saves_slopes);
    // The list for any number of tokens decides whether a section has such an order; for whole
    // tiles 4 % are then worth it (8192 x 8192 with as many tokens gains 7, "rest").
    const double most = (tokens.whole ? kRestIsWorthIt : kWorthIt) * time(best);
    if (!in_turns.empty() && longest(in_turns) < most) {
      best.blocks = std::move(in_turns);
      busy = longest(best.blocks);
    }
  }
  return {make_units(in_token_order(best.blocks, groups.size()), groups), turns_of(best.blocks),
          busy, mean};
}

OtherLanes vary_lanes(const std::vector<GroupWork>& groups, const Spread& any, int thread_blocks,
                      bool saves_slopes) {
  constexpr int32_t kFewer = (kLaneLists - 1) / 2;
  constexpr int32_t kFine = 28;  // one more or less of up to twice as many lanes
  OtherLanes other{};
  const auto is_dense = [](const GroupWork& g) { return g.dense; };
  if (any.turns > 1 || std::count_if(groups.begin(), groups.end(), is_dense) != 1) return other;
  const auto dense = std::find_if(groups.begin(), groups.end(), is_dense) - groups.begin();
  const std::vector<double> times = tile_times(groups, saves_slopes);
  other.lists.dense_ns = static_cast<int32_t>(kProductNs * times[static_cast<size_t>(dense)]);
  Index own(groups.size(), 0);
  for (const GroupUnit& u : any.units) {
    if (u.begin != u.end) own[static_cast<size_t>(u.group)] = u.lanes;
  }
  LaneList* list = other.lists.list;
  *list++ = describe(groups, times, own);
  std::vector<double> times_of_others = times;
  times_of_others.erase(times_of_others.begin() + dense);
  const int32_t usual = own[static_cast<size_t>(dense)], step = std::max(1, usual / kFine);
  for (int32_t i = -kFewer; i < kLaneLists - kFewer; ++i) {
    const int32_t lanes_of_dense = usual + i * step, left = thread_blocks - lanes_of_dense;
    const bool far = 4 * std::abs(i) * step > usual;
    if (i == 0 || far || left < static_cast<int32_t>(times_of_others.size())) continue;
    Index lanes = cut_lanes(times_of_others, kAnyTokens, left);
    lanes.insert(lanes.begin() + dense, lanes_of_dense);
    ThreadBlocks blocks(static_cast<size_t>(thread_blocks));
    deal_lanes(blocks, groups, times, kAnyTokens, lanes, 0, /*once=*/true);
    const auto units = make_units(in_token_order(blocks, groups.size()), groups);
    other.units.insert(other.units.end(), units.begin(), units.end());
    *list++ = describe(groups, times, lanes);
  }
  return other;
}

int32_t choose_ahead_blocks(const std::vector<GroupWork>& groups, Order order, int thread_blocks,
                            int32_t x_tiles) {
  // In products, as tile_times(): reading a tile column of x from memory at 2.8 TB/s, starting a
  // kernel, what a thread block that forms t takes for an x tile (fitted: 63 GB/s), and until the
  // product sees the first of t.
  constexpr double kRead = 3.75, kLaunch = 10, kTile = 1.3, kStart = 8;
  constexpr int32_t kFactorAndX = 3;  // 8 KB each, loaded for an x tile
  const int32_t most = thread_blocks / 3;
  // Two multiprocessors share a path to L2, and neighbours in the list of units what they read.
  constexpr int32_t kEven = 2;
  constexpr double kWorthIt = .97;
  double bytes = 0;
  for (const GroupWork& g : groups) bytes += g.loads();
  // Where L2 is the limit, what t loads delays the product.
  const double slower = bound_by_loads(groups) ? 1 + kFactorAndX * x_tiles / bytes : 1;
  const double tile = kTile * x_tiles;
  const double before =
      spread_groups(groups, order, thread_blocks, kAnyTokens).longest + kRead * x_tiles + kLaunch;
  int32_t best = 0;
  double least = kWorthIt * before;
  for (int32_t ahead = kEven; ahead <= most; ahead += kEven) {
    const Spread others = spread_groups(groups, order, thread_blocks - ahead, kAnyTokens);
    // Beside a product in turns t took a quarter longer (product_sm90_plans_h200.json, "rules",
    // v1).
    if (others.turns > 1) continue;
    const double product = slower * others.longest;
    const double time = std::max(product, kAnyTokens.tiles * tile / ahead) + tile + kStart;
    if (time < least) {
      least = time;
      best = ahead;
    }
  }
  return best;
}

}  // namespace pixelfly
