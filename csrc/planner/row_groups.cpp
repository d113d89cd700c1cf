// Schedule of the row-group product: which two output tiles share a thread block, in which order it
// loads x, and how the groups are spread over thread blocks.
#include <algorithm>
#include <vector>

#include "planner/pair_rows.h"
#include "planner/plan.h"
#include "planner/tile_rows.h"

namespace pixelfly {
namespace {

using Index = std::vector<int32_t>;

std::vector<GroupStep> merge(const Row* first, const Row* second) {
  std::vector<GroupStep> steps;
  size_t i = 0, j = 0;
  const size_t n = first->size(), m = second == nullptr ? 0 : second->size();
  while (i < n || j < m) {
    const bool take_first = i < n && (j >= m || (*first)[i].x_tile <= (*second)[j].x_tile);
    const bool take_second = j < m && (i >= n || (*second)[j].x_tile <= (*first)[i].x_tile);
    GroupStep step{take_first ? (*first)[i].x_tile : (*second)[j].x_tile, {-1, -1}, 0};
    if (take_first) step.weight[0] = (*first)[i++].weight;
    if (take_second) step.weight[1] = (*second)[j++].weight;
    steps.push_back(step);
  }
  return steps;
}

// Orders the steps of groups that run side by side so that as few different x tiles as possible are
// wanted at the same step: L2 serves thread blocks that load the same tile at the same moment about
// twice as fast. Greedy set cover, step by step: the tile that most groups without one for this
// step still want goes to all of them. On the 8 pairs of a butterfly's 3-cube that is the perfect
// code order: two tiles a step.
void order_in_phase(std::vector<std::vector<GroupStep>*> groups, int32_t x_tiles) {
  size_t longest = 0;
  std::vector<Index> users(static_cast<size_t>(x_tiles));  // groups that still want a tile
  for (size_t g = 0; g < groups.size(); ++g) {
    longest = std::max(longest, groups[g]->size());
    for (const GroupStep& s : *groups[g]) {
      users[static_cast<size_t>(s.x_tile)].push_back(static_cast<int32_t>(g));
    }
  }
  std::vector<std::vector<GroupStep>> ordered(groups.size());
  for (size_t step = 0; step < longest; ++step) {
    std::vector<char> served(groups.size(), 0);
    Index wanted(static_cast<size_t>(x_tiles));
    for (size_t x = 0; x < users.size(); ++x) wanted[x] = static_cast<int32_t>(users[x].size());
    while (true) {
      const auto most = std::max_element(wanted.begin(), wanted.end());
      if (most == wanted.end() || *most == 0) break;
      const auto x = static_cast<int32_t>(most - wanted.begin());
      Index keep;
      const Index takers = users[static_cast<size_t>(x)];
      for (int32_t g : takers) {
        if (served[static_cast<size_t>(g)]) {
          keep.push_back(g);
          continue;
        }
        served[static_cast<size_t>(g)] = 1;
        auto& left = *groups[static_cast<size_t>(g)];
        for (const GroupStep& s : left) --wanted[static_cast<size_t>(s.x_tile)];
        const auto at = std::find_if(left.begin(), left.end(),
                                     [x](const GroupStep& s) { return s.x_tile == x; });
        ordered[static_cast<size_t>(g)].push_back(*at);
        left.erase(at);
      }
      users[static_cast<size_t>(x)] = std::move(keep);
    }
  }
  for (size_t g = 0; g < groups.size(); ++g) *groups[g] = std::move(ordered[g]);
}

// How many consecutive groups run side by side: as many as there are thread blocks. Where groups
// stream more weights than L2 keeps, these come from memory for every two token tiles; fewer groups
// at a time then read less, unless reading x once for each part costs more.
size_t side_by_side(const std::vector<GroupWork>& groups, size_t thread_blocks, int32_t x_tiles) {
  size_t streamed = 0;
  for (const GroupWork& g : groups) {
    if (!g.resident) streamed += static_cast<size_t>(g.weights);
  }
  const size_t parts = streamed / kGroupStreamedTiles + 1;
  const size_t lanes = std::max<size_t>(1, thread_blocks / std::max<size_t>(1, groups.size()));
  const size_t x = lanes * 4 * static_cast<size_t>(x_tiles);  // two token tiles, in weight tiles
  const bool worth_it = streamed > (parts - 1) * x;
  return std::min(thread_blocks, worth_it ? (groups.size() + parts - 1) / parts : groups.size());
}

bool any_dense(const std::vector<GroupWork>& groups) {
  return std::any_of(groups.begin(), groups.end(), [](const GroupWork& g) { return g.dense; });
}

// Of few tiles of x, L2 serves any order alike.
constexpr int32_t kFewTiles = 24;

// Of x: 96 KB on their way (see kernels/product_sm90_work.cuh).
constexpr int32_t kEnoughStages = 6;

bool serves_both(const GroupStep& s) { return s.weight[0] >= 0 && s.weight[1] >= 0; }

// The groups of a section before they are spread over thread blocks.
struct Grouping {
  Pairs pairs;
  std::vector<std::vector<GroupStep>> lists;  // without low rank
  std::vector<GroupWork> work;
  Order order;
  int32_t register_steps;
};

Spread spread(const Grouping& g, const LayoutView& layout) {
  return spread_groups(g.work, g.order, layout.thread_blocks, kAnyTokens);
}

// Steps whose weights stay in registers. Of pairs, whose last ones then serve both rows: with low
// rank t's does anyway, beside a dense row there is the one that all rows share, and where rows
// share their tiles of x all do; in other squares the order in phase is worth more, and a second
// step only where the first leaves room for few tiles of x (product_sm90_plans_h200.json,
// "registers").
int32_t choose_register_steps(const Grouping& g, const LayoutView& layout, int32_t x_tiles) {
  if (layout.block_size < kGroupTile) return 0;
  const auto all = [&](auto holds) { return std::all_of(g.work.begin(), g.work.end(), holds); };
  if (all([](const GroupWork& w) { return w.outputs == 1; })) {
    const bool enough = all([](const GroupWork& w) { return w.x_tiles >= kAloneRegisterSteps; });
    return enough ? kAloneRegisterSteps : 0;
  }
  const bool shared = share_x(g.work), dense = any_dense(g.work);
  if (layout.rank == 0 && !dense && !shared && x_tiles > kFewTiles) return 0;
  const bool room = all([](const GroupWork& w) {
    return w.dense || w.weights - w.outputs <= kGroupRoom - 2 * kEnoughStages;
  });
  int32_t steps = shared || !room ? kPairRegisterSteps : 1;
  for (size_t i = 0; i < g.work.size(); ++i) {
    const auto both = std::count_if(g.lists[i].begin(), g.lists[i].end(), serves_both);
    const auto serve_all = static_cast<int32_t>(both) + group_tiles(layout.rank);
    steps = std::min(steps, g.work[i].outputs == 1 ? g.work[i].x_tiles : serve_all);
  }
  return steps;
}

// All groups side by side, as far as L2 keeps what they stream. Beside a dense row, groups that
// share little of x do better half of them at a time than all of them in two turns; or, where that
// leaves fewer thread blocks idle, most of them in one turn and the rest after it.
Order choose_order(Grouping g, const LayoutView& layout, int32_t x_tiles) {
  const size_t count = g.work.size();
  g.order = {side_by_side(g.work, static_cast<size_t>(layout.thread_blocks), x_tiles), 0};
  if (!any_dense(g.work) || share_x(g.work)) return g.order;
  if (spread(g, layout).turns == 2) {
    const Order all = g.order;
    g.order.together = (count + 1) / 2;
    if (g.order.together >= all.together || spread(g, layout).turns != 2) g.order = all;
  }
  // Measured where all other weights stay (product_sm90_rest_h200.json).
  const bool stay = std::all_of(g.work.begin(), g.work.end(),
                                [](const GroupWork& w) { return w.dense || w.resident; });
  if (!stay) return g.order;
  double least = spread(g, layout).longest;
  Order best = g.order;
  for (g.order.rest = 1; 4 * g.order.rest <= count; ++g.order.rest) {
    const double time = spread(g, layout).longest;
    if (time < least) {
      least = time;
      best = g.order;
    }
  }
  return best;
}

Grouping make_groups(const std::vector<Row>& rows, const Pairs& pairs, const LayoutView& layout,
                     int32_t x_tiles, bool in_registers = true) {
  Grouping g{pairs, {}, {}, {}, 0};
  for (const auto& [a, b] : pairs) {
    g.lists.push_back(
        merge(&rows[static_cast<size_t>(a)], b < 0 ? nullptr : &rows[static_cast<size_t>(b)]));
    g.work.push_back(work_of(g.lists.back(), b < 0 ? 1 : 2, group_tiles(layout.rank)));
  }
  compare_groups(g.work);
  if (in_registers) g.register_steps = choose_register_steps(g, layout, x_tiles);
  for (GroupWork& w : g.work) w.in_registers = g.register_steps * w.outputs;
  compare_groups(g.work);
  const bool any =
      std::any_of(g.work.begin(), g.work.end(), [](const auto& w) { return w.holds(); });
  if (!any) g.register_steps = 0;
  g.order = choose_order(g, layout, x_tiles);
  return g;
}

double loads_of(const Grouping& g) {
  double sum = 0;
  for (const GroupWork& w : g.work) sum += w.loads();
  return sum;
}

Pairs all_alone(const std::vector<Row>& rows) {
  Pairs alone;
  for (size_t i = 0; i < rows.size(); ++i) alone.emplace_back(static_cast<int32_t>(i), -1);
  return alone;
}

// Rows alone, with eight steps in registers: where the weights of pairs do not stay and theirs
// leave enough room for x, or where they have no others. Empty where that is not expected to be
// quicker: they would load too much, or take turns (product_sm90_plans_h200.json, "registers").
Grouping rows_in_registers(const std::vector<Row>& rows, const Grouping& all,
                           const LayoutView& layout, int32_t x_tiles) {
  // Times the loads of the pairs.
  constexpr double kMostForStreamed = 0.85, kMostBesideDense = 0.9, kMostForOthers = 1.25;
  if (rows.size() > static_cast<size_t>(layout.thread_blocks)) return {};
  const bool streamed =
      std::none_of(all.work.begin(), all.work.end(), [](const GroupWork& g) { return g.resident; });
  const bool dense = any_dense(all.work);
  if (dense && !streamed) return {};
  Grouping some = make_groups(rows, all_alone(rows), layout, x_tiles);
  if (some.register_steps == 0) return {};
  const int32_t most_in_shared = streamed ? kGroupRoom - 2 * kEnoughStages : 0;
  const bool fit = std::all_of(some.work.begin(), some.work.end(), [&](const GroupWork& g) {
    return g.dense || g.in_shared() <= most_in_shared;
  });
  const double most_loads = dense ? kMostBesideDense : streamed ? kMostForStreamed : kMostForOthers;
  const bool quicker = fit && loads_of(some) <= most_loads * loads_of(all);
  return quicker && spread(some, layout).turns == 1 ? some : Grouping{};
}

// Rows in pairs; or most of them alone, where that is expected to be quicker and thread blocks are
// as busy. What was measured are rows that have a thread block each, and no dense ones among them.
Grouping choose_groups(const std::vector<Row>& rows, const LayoutView& layout, int32_t x_tiles) {
  const Pairs pairs = pair_rows(rows, x_tiles);
  Grouping all = make_groups(rows, pairs, layout, x_tiles);
  Grouping in_registers = rows_in_registers(rows, all, layout, x_tiles);
  if (!in_registers.pairs.empty()) return in_registers;
  const Parted parted = part_pairs(rows, pairs, group_tiles(layout.rank));
  const size_t alone = 2 * (parted.pairs.size() - pairs.size());
  if (4 * alone < 3 * rows.size() || any_dense(all.work)) return all;
  const Grouping some = make_groups(rows, parted.pairs, layout, x_tiles);
  const Spread of_some = spread(some, layout), of_all = spread(all, layout);
  if (of_some.turns > 1) return all;
  const bool quicker = parted.time * of_some.longest / of_some.mean <
                       parted.time_of_pairs * of_all.longest / of_all.mean;
  return quicker ? some : all;
}

// Rows alone for few tokens, where a thread block has a few token tiles and waits at its start for
// its weights: half as many. Empty where that is not expected to be quicker: weights do not stay,
// rows share most of what they read of x, or thread blocks would serve several rows in turn.
// product_sm90_plans_h200.json, "few".
Grouping rows_for_few_tokens(const std::vector<Row>& rows, const Grouping& all,
                             const LayoutView& layout, int32_t x_tiles) {
  constexpr double kMostLoads = 1.45;  // of x, times those of the pairs
  const bool stay = std::all_of(all.work.begin(), all.work.end(),
                                [](const GroupWork& g) { return g.resident && !g.dense; });
  if (!stay || all.pairs.size() == rows.size()) return {};
  Grouping some = make_groups(rows, all_alone(rows), layout, x_tiles, false);
  if (loads_of(some) > kMostLoads * loads_of(all) || spread(some, layout).turns > 1) return {};
  return some;
}

// Orders the groups' steps, and deals the groups to the thread blocks that do not form t, with a
// list for each number of token tiles up to `most_tiles`. `lanes`: of slopes not saved, saved.
GroupSection append_section(PlanBuilder& builder, const LayoutView& layout, bool transposed,
                            int32_t x_tiles, Grouping grouping, int32_t ahead_blocks,
                            int32_t most_tiles, LaneLists* lanes) {
  auto& [pairs, lists, work, order, register_steps] = grouping;
  GroupSection section{};
  section.register_steps = register_steps;
  section.ahead_blocks = ahead_blocks;
  // Of rows alone L2 serves the ascending order as well, if none is dense.
  const bool dense = any_dense(work);
  const size_t part_size = order.rest > 0 ? lists.size() - order.rest : order.together;
  for (size_t begin = 0; begin < lists.size() && x_tiles > kFewTiles; begin += part_size) {
    std::vector<std::vector<GroupStep>*> part;
    for (size_t g = begin; g < std::min(lists.size(), begin + part_size); ++g) {
      if (pairs[g].second >= 0 || dense) part.push_back(&lists[g]);
    }
    order_in_phase(std::move(part), x_tiles);
  }

  std::vector<RowGroup> groups;
  std::vector<GroupStep> steps;
  for (size_t g = 0; g < lists.size(); ++g) {
    const auto [a, b] = pairs[g];
    // Beside those of t.
    for (int32_t i = group_tiles(layout.rank); i < register_steps && b >= 0; ++i) {
      const auto both = std::find_if(lists[g].begin(), lists[g].end(), serves_both);
      std::rotate(both, both + 1, lists[g].end());
    }
    for (int32_t r = 0; r < group_tiles(layout.rank); ++r) {
      lists[g].push_back({x_tiles + r, {0, b < 0 ? -1 : 0}, 0});
    }
    const auto begin = static_cast<int32_t>(steps.size());
    int32_t slot = 0;
    for (GroupStep step : lists[g]) {
      step.slot = slot;
      slot += (step.weight[0] >= 0) + (step.weight[1] >= 0);
      steps.push_back(step);
    }
    groups.push_back({{a, b}, begin, static_cast<int32_t>(steps.size())});
    if (slot > section.max_weights) {
      section.max_weights = slot;
      section.max_steps = static_cast<int32_t>(lists[g].size());
    }
    section.dense_groups += work[g].dense;
    section.loads += work[g].loads();
    if (work[g].resident) {
      section.resident_weights = std::max(section.resident_weights, slot);
    }
  }
  std::vector<GroupUnit> units;
  OtherLanes others[2];
  const int thread_blocks = layout.thread_blocks - ahead_blocks;
  for (int list = 0; list < (transposed ? 1 : 2) * kGroupLists; ++list) {
    const ListTokens tokens = kGroupTokenLists[list % kGroupLists];
    const int saves_slopes = list / kGroupLists;
    if (tokens.tiles > most_tiles) continue;
    const Spread more = spread_groups(work, order, thread_blocks, tokens, saves_slopes != 0);
    section.num_units[list] = static_cast<int32_t>(more.units.size());
    units.insert(units.end(), more.units.begin(), more.units.end());
    if (tokens.tiles == kAnyTokenTiles) {
      others[saves_slopes] = vary_lanes(work, more, thread_blocks, saves_slopes != 0);
    }
  }
  section.num_groups = static_cast<int32_t>(groups.size());
  section.groups_offset = builder.append(groups);
  section.steps_offset = builder.append(steps);
  section.units_offset = builder.append(units);
  for (int i = 0; i < 2 && lanes != nullptr; ++i) {
    lanes[i] = others[i].lists;
    lanes[i].units_offset = builder.append(others[i].units);
  }
  return section;
}

}  // namespace

GroupSections append_row_groups(PlanBuilder& builder, const LayoutView& layout, bool transposed) {
  const int32_t b = layout.block_size;
  if (b != 32 && b != 64 && b != 128) return {};
  const int32_t x_tiles = group_tiles(transposed ? layout.out_features : layout.in_features);
  std::vector<GroupQuad> quads;
  const auto rows = b == 32 ? quad_rows(layout, transposed, quads) : tile_rows(layout, transposed);
  const int32_t quads_offset = builder.append(quads);
  Grouping all = choose_groups(rows, layout, x_tiles);
  int32_t ahead_blocks = 0;
  if (layout.rank > 0 && layout.rank <= kGroupTile) {
    ahead_blocks = choose_ahead_blocks(all.work, all.order, layout.thread_blocks, x_tiles);
  }
  Grouping few = rows_for_few_tokens(rows, all, layout, x_tiles);
  int32_t ahead_of_few = 0, most_tiles = kFewTokenTiles;
  // Of pairs, weights in registers gain from 4096 tokens on: fewer do not make up for what loading
  // them first costs (few_h200.json).
  if (few.pairs.empty() && all.register_steps > 0 && all.register_steps <= kPairRegisterSteps) {
    few = make_groups(rows, all.pairs, layout, x_tiles, false);
    ahead_of_few = ahead_blocks;
    most_tiles = kFewTokenTiles - 1;
  }
  const auto append = [&](Grouping& grouping, int32_t ahead, int32_t most, LaneLists* lanes) {
    return append_section(builder, layout, transposed, x_tiles, std::move(grouping), ahead, most,
                          lanes);
  };
  GroupSections sections{};
  sections.many = append(all, ahead_blocks, kAnyTokenTiles, sections.lanes);
  if (!few.pairs.empty()) sections.few = append(few, ahead_of_few, most_tiles, nullptr);
  sections.many.quads_offset = sections.few.quads_offset = quads_offset;
  return sections;
}

}  // namespace pixelfly
