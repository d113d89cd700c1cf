// What test_planner.cpp checks of how rows are grouped, and groups dealt to thread blocks; and of
// when their product lets the next kernel start.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "launch/early_start.h"
#include "tests/plan_case.h"

namespace pixelfly {

inline const GroupSection& section_of(const PlanHeader& h, bool transposed, bool few) {
  return few ? (transposed ? h.transposed_few : h.forward_few)
             : (transposed ? h.transposed : h.forward);
}

// All lists of a section; one of few tokens has those alone that serve them.
inline std::vector<GroupUnitList> unit_lists(const PlanHeader& h, bool transposed, bool few) {
  const GroupSection& s = section_of(h, transposed, few);
  std::vector<GroupUnitList> lists;
  for (const bool saves : {false, true}) {
    if (saves && transposed) continue;
    for (const ListTokens& tokens : kGroupTokenLists) {
      const GroupUnitList list = unit_list(s, tokens.tiles, saves);
      if (!few || list.count > 0) lists.push_back(list);
    }
    if (few) continue;
    const LaneLists& lanes = transposed ? h.transposed_lanes : h.forward_lanes[saves];
    GroupUnitList list = unit_list(s, kAnyTokenTiles, saves);
    list.offset = lanes.units_offset;
    for (int i = 1; i < kLaneLists && lanes.list[i].dense_lanes > 0; ++i) {
      lists.push_back(list);
      list.offset += list.count * static_cast<int32_t>(sizeof(GroupUnit) / sizeof(int32_t));
    }
  }
  return lists;
}

// A block row and a block column of global blocks: the dense row has more to load than the others.
inline void check_dense_row() {
  g_case = "dense row";
  const Plan plan(make(64, 17, 64, 0, 0,
                       [](int32_t i, int32_t j) { return i == 0 || j == 0 || j / 2 == i / 8; }));
  const GroupSection& s = plan.header.forward;
  expect(s.dense_groups == 1, "one dense group");
  const auto* groups = plan.at<RowGroup>(s.groups_offset);
  for (const auto& [offset, count] : unit_lists(plan.header, false, false)) {
    std::map<int32_t, int32_t> lanes;
    const auto* units = plan.at<GroupUnit>(offset);
    for (int32_t i = 0; i < count; ++i) {
      const GroupUnit& u = units[i];
      if (u.begin == u.end) continue;
      ++lanes[u.group];
      const int32_t x_tiles = groups[u.group].step_end - groups[u.group].step_begin;
      const bool dense = x_tiles == 17;
      expect(u.stages == (dense ? kMaxGroupStages : x_tiles + 3), "the others load no further");
      expect(dense == (u.weights == kGroupStreams), "streams, as more stages fit then");
    }
    const auto most =
        std::max_element(lanes.begin(), lanes.end(),
                         [](const auto& a, const auto& b) { return a.second < b.second; });
    expect(groups[most->first].step_end - groups[most->first].step_begin == 17, "the most lanes");
  }
}

// 32 whole token tiles over lanes for any number leave one group waiting for another: lanes of
// their own must even that out, and must not be there where nothing is gained.
inline void check_whole_tiles() {
  g_case = "whole tiles";
  const auto lanes_of = [](const Plan& plan, int64_t token_tiles) {
    const GroupSection& s = plan.header.forward;
    const GroupUnitList list = unit_list(s, token_tiles, false);
    std::vector<int32_t> lanes(static_cast<size_t>(s.num_groups), 0);
    for (int32_t i = 0; i < list.count; ++i) {
      const GroupUnit& u = plan.at<GroupUnit>(list.offset)[i];
      if (u.begin != u.end) lanes[static_cast<size_t>(u.group)] = u.lanes;
    }
    return lanes;
  };
  const Plan plan(make(16, 16, 64, 0, 0, global));
  const auto any = lanes_of(plan, 33), own = lanes_of(plan, 32);
  const int32_t most_any = *std::max_element(any.begin(), any.end());
  const int32_t most_own = *std::max_element(own.begin(), own.end());
  expect(most_own == 32 && most_any != 32, "a lane for each tile of the dense row");
  const Plan even(make(16, 16, 64, 0, 0, butterfly));
  expect(lanes_of(even, 32) == lanes_of(even, 33), "groups alike");
}

// The lanes of a dense row follow the number of tokens, so that its last token tiles are not few.
inline void check_lanes() {
  g_case = "lanes of a dense row";
  const auto narrow = [](int32_t i, int32_t j) { return i == 0 || j == 0 || butterfly(i, j / 4); };
  const Plan plan(make(16, 64, 64, 0, 0, narrow));
  const PlanHeader& h = plan.header;
  expect(h.forward.register_steps == kAloneRegisterSteps, "rows alone");
  std::set<int32_t> offsets;
  for (int64_t token_tiles = 65; token_tiles < 400; ++token_tiles) {
    const GroupUnitList list = group_units(h, false, token_tiles, false);
    offsets.insert(list.offset);
    std::map<int32_t, int32_t> lanes;
    for (int32_t i = 0; i < list.count; ++i) {
      const GroupUnit& u = plan.at<GroupUnit>(list.offset)[i];
      if (u.begin != u.end) ++lanes[u.group];
    }
    const auto& chosen =
        *std::find_if(std::begin(h.forward_lanes[0].list), std::end(h.forward_lanes[0].list),
                      [&](const LaneList& l) { return l.dense_lanes == lanes[0]; });
    const auto rounds = [&](int32_t n) { return (token_tiles + n - 1) / n; };
    const auto time = [&](const LaneList& l) {
      return std::max(rounds(l.dense_lanes) * h.forward_lanes[0].dense_ns,
                      rounds(l.other_lanes) * l.other_ns);
    };
    for (const LaneList& l : h.forward_lanes[0].list) {
      expect(l.dense_lanes == 0 || time(chosen) <= time(l), "the quickest");
    }
  }
  expect(offsets.size() > 2, "several lists");
  expect(group_units(h, false, 64, false).offset == unit_list(h.forward, 64, false).offset,
         "whole tiles have a list of their own");
  const Plan even(make(16, 16, 64, 0, 0, butterfly));
  expect(even.header.forward_lanes[0].list[0].dense_lanes == 0, "no dense row");
}

inline int32_t turns_of(const GroupSection& s, int64_t token_tiles, int32_t thread_blocks) {
  return unit_list(s, token_tiles, false).count / (thread_blocks - s.ahead_blocks);
}

// Rows that share few tiles of x have thread blocks of their own where weights of two leave little
// room for x, if thread blocks are as busy.
inline void check_pairs() {
  const auto groups = [](const char* name, int32_t rows, int32_t rank, auto keep) {
    g_case = name;
    return Plan(make(rows, rows, 64, rank, 0, keep)).header.forward;
  };
  const GroupSection square = groups("square", 128, 0, butterfly);
  expect(square.num_groups == 128 && square.max_weights == 8, "rows alone");
  expect(groups("smaller", 64, 0, butterfly).num_groups == 32, "in pairs, for which is room");
  expect(groups("with a dense row", 128, 0, global).num_groups == 64, "in pairs");
  const auto nine = [&](const char* name, int32_t rows) {  // of each row, at random
    std::mt19937 random(9);
    std::vector<std::set<int32_t>> columns(static_cast<size_t>(rows));
    for (auto& of_row : columns) {
      while (of_row.size() < 9) of_row.insert(static_cast<int32_t>(random() % 64));
    }
    g_case = name;
    const auto keep = [&](int32_t i, int32_t j) {
      return columns[static_cast<size_t>(i)].count(j) > 0;
    };
    return Plan(make(rows, 64, 64, 0, 0, keep)).header.forward.num_groups;
  };
  expect(nine("64 rows of nine", 64) == 64, "rows alone");
  expect(nine("70 rows of nine", 70) == 35, "in pairs, as 70 rows leave thread blocks idle");
  expect(nine("140 rows of nine", 140) == 70, "in pairs, not in turns");
}

// Weights in registers: of rows alone where pairs would stream theirs or rows have no others, and
// of steps that serve both rows of every pair.
inline void check_registers() {
  const auto section = [](const char* name, int32_t rows, int32_t columns, int32_t rank,
                          auto keep) {
    g_case = name;
    return Plan(make(rows, columns, 64, rank, 0, keep)).header.forward;
  };
  const auto bands = [](int32_t i, int32_t j) { return (j + 9 * i) % 36 < 13; };
  const auto wide_bands = [](int32_t i, int32_t j) { return (j + 18 * i) % 72 < 23; };
  const auto narrow = [](int32_t i, int32_t j) { return butterfly(i, j / 4); };
  const auto left = [](int32_t, int32_t j) { return j < 20; };
  const auto ring = [](int32_t i, int32_t j) {
    return j == i || j == (i + 7) % 32 || j == (i + 13) % 32;
  };
  const auto lower = [](int32_t i, int32_t j) { return i >= 12 && j < 9; };
  const auto alone = [](const GroupSection& s, int32_t rows) {
    return s.num_groups == rows && s.register_steps == kAloneRegisterSteps;
  };
  for (const int32_t rank : {0, 8}) {
    expect(alone(section("bands", 4, 36, rank, bands), 4), "rows alone");
    expect(alone(section("narrow", 16, 64, rank, narrow), 16), "rows alone");
    expect(section("wide", 64, 16, rank, wide).register_steps == 2, "all steps serve both");
    expect(section("rows alike", 16, 64, rank, left).num_groups == 8, "in pairs: as much of x");
  }
  expect(section("wide bands", 4, 72, 0, wide_bands).num_groups == 2, "in pairs: no room for x");
  expect(alone(section("eight steps", 64, 64, 64, butterfly), 64), "no other weights");
  expect(section("three blocks", 32, 32, 72, ring).register_steps == 1, "a step of t");
  expect(section("dense row", 64, 64, 0, global).register_steps == 1, "the column of all rows");
  expect(section("many weights", 128, 128, 0, global).register_steps == 2, "room for x");
  expect(section("square", 32, 32, 0, butterfly).register_steps == 0, "the order in phase");
  expect(section("t beside", 16, 16, 64, butterfly).register_steps == 1, "t's step");
  expect(section("empty rows", 16, 16, 0, lower).register_steps == 0, "a group without steps");
  g_case = "blocks of 32";
  expect(Plan(make(64, 64, 32, 64, 0, butterfly)).header.forward.register_steps == 0, "none");
}

// Up to 4096 tokens rows are alone, and t is formed before, where rows share little of x and their
// weights stay.
inline void check_few_tokens() {
  const auto groups = [](const char* name, int32_t rows, int32_t columns, int32_t rank, auto keep,
                         int64_t token_tiles) {
    g_case = name;
    const Plan plan(make(rows, columns, 64, rank, 0, keep));
    const GroupSection& s = group_section(plan.header, false, token_tiles);
    expect(s.register_steps > 0 || s.num_groups < rows || s.ahead_blocks == 0, "t before");
    return s.num_groups;
  };
  const auto half = [](int32_t, int32_t j) { return j < 20; };
  expect(groups("few", 16, 16, 72, butterfly, 32) == 16, "rows alone");
  for (const int32_t rank : {0, 64}) {
    expect(groups("few", 64, 64, rank, butterfly, 1) == 64, "rows alone");
    expect(groups("few", 16, 16, rank, butterfly, 32) == 16, "rows alone");
    expect(groups("more", 64, 64, rank, butterfly, 33) == (rank > 0 ? 64 : 32), "in pairs");
  }
  expect(groups("rows that share x", 64, 16, 0, wide, 16) == 32, "in pairs");
  const Plan shared(make(64, 16, 64, 0, 0, wide));
  expect(group_section(shared.header, false, 31).register_steps == 0, "not in registers");
  expect(group_section(shared.header, false, 32).register_steps == 2, "in registers");
  expect(groups("streamed", 64, 64, 0, half, 16) == 32, "in pairs");
  expect(groups("too many rows", 140, 140, 0, butterfly, 16) == 70, "in pairs, not in turns");
}

// Where a layer widens, rows with the same tiles stay together, and may take turns if there are
// tokens enough to pay for them; t is not beside a product in turns.
inline void check_turns() {
  const auto forward = [](int32_t rows, int32_t cols, int32_t rank, auto keep) {
    return Plan(make(rows, cols, 64, rank, 0, keep)).header.forward;
  };
  g_case = "wide";
  const GroupSection even = forward(64, 16, 0, wide);
  expect(even.num_groups == 32 && turns_of(even, 128, 132) == 1, "pairs of the same columns");
  const GroupSection uneven = forward(96, 24, 64, wide);
  expect(uneven.num_groups == 48 && turns_of(uneven, 128, 132) == 2, "two turns for 48 pairs");
  expect(turns_of(uneven, 8, 132) == 1, "one turn of few tokens");
  expect(uneven.ahead_blocks == 0, "t before a product in turns");
  const auto third = [](int32_t i, int32_t j) { return butterfly(i / 3, j); };
  expect(forward(48, 16, 64, third).ahead_blocks > 0, "t beside the product of one turn");
}

// Beside a dense row most groups run in one turn, and a few that are left over after it, on the
// thread blocks that do not serve that row; where this does not fill the machine half of them run
// at a time, if that takes two turns too.
inline void check_rest() {
  g_case = "dense row";
  for (const int32_t rows : {64, 80, 128}) {
    const Plan plan(make(rows, rows, 64, 0, 0, global));
    const GroupSection& s = plan.header.forward;
    expect(turns_of(s, 128, 132) == 2, "two turns");
    const GroupUnit* units = plan.at<GroupUnit>(unit_list(s, 128, false).offset);
    std::set<int32_t> first, second;
    int idle = 0;
    for (int i = 0; i < 132; ++i) {
      const GroupUnit &now = units[i], &later = units[132 + i];
      idle += now.begin == now.end;
      first.insert(now.group);
      if (later.begin == later.end) continue;
      second.insert(later.group);
      expect(now.weights != kGroupStreams, "not on the dense row's");
    }
    const auto rest = static_cast<int32_t>(second.size());
    expect(idle < 4 && rest > 0 && 4 * rest <= s.num_groups, "a few groups are left over");
    expect(*second.begin() == s.num_groups - rest && *first.rbegin() < *second.begin(), "the last");
    expect(rows == 128 || turns_of(s, 16, 132) == 1, "one turn of few tokens");
  }
  expect(turns_of(Plan(make(96, 96, 64, 0, 0, global)).header.forward, 128, 132) == 1, "one turn");
  const Plan plan(make(128, 128, 64, 64, 0, global));
  const GroupSection& halves = plan.header.forward;
  const GroupUnit* units = plan.at<GroupUnit>(unit_list(halves, 128, false).offset);
  int later = 0;  // units of the first turn that are of the second half
  for (int i = 0; i < 132; ++i) later += units[i].group >= halves.num_groups / 2;
  expect(turns_of(halves, 128, 132) == 2 && later < 10, "half of the groups at a time");
  for (const int32_t rows : {140, 188, 192, 200}) {
    const GroupSection s = Plan(make(rows, rows, 64, 0, 0, global)).header.forward;
    for (const int32_t token_tiles : {8, 32, 64, 128}) {
      expect(turns_of(s, token_tiles, 132) <= 3, "one turn more than halves at most");
    }
  }
}

// With many tokens a product of blocks alone lets the next kernel be placed early if its groups are
// many and share little of x.
inline void check_early_start() {
  const auto early = [](const char* name, int32_t rows, int32_t cols, int32_t rank, auto keep,
                        int64_t tokens) {
    g_case = name;
    const PlanHeader h = Plan(make(rows, cols, 64, rank, 0, keep)).header;
    return product_starts_next_early(tokens, h, group_section(h, false, tokens / 128));
  };
  expect(early("square", 64, 64, 0, butterfly, 16384), "in 32 groups");
  expect(early("wider square", 128, 128, 0, butterfly, 16384), "in 128 rows alone");
  expect(!early("narrow square", 16, 16, 0, butterfly, 16384), "not in eight groups");
  expect(!early("wide", 64, 16, 0, wide, 16384), "not where rows share x");
  expect(early("few tokens", 16, 16, 0, butterfly, 4096), "with few tokens");
  expect(early("low rank", 16, 16, 64, butterfly, 16384), "with low rank");
  expect(early("dense row", 16, 16, 0, global, 16384), "beside a dense row");
}

// Tiles of x in ascending order where there are few, and in phase where there are many.
inline void check_order() {
  for (const int32_t cols : {24, 32}) {
    g_case = std::to_string(cols) + " tiles of x";
    const Plan plan(make(cols, cols, 64, 0, 0, butterfly));
    const GroupSection& s = plan.header.forward;
    bool ascending = true;
    for (int32_t g = 0; g < s.num_groups; ++g) {
      const RowGroup& group = plan.at<RowGroup>(s.groups_offset)[g];
      const GroupStep* steps = plan.at<GroupStep>(s.steps_offset);
      for (int32_t i = group.step_begin + 1; i < group.step_end - s.register_steps; ++i) {
        ascending &= steps[i - 1].x_tile < steps[i].x_tile;
      }
    }
    expect(ascending == (cols == 24), "the order of tiles");
  }
}

}  // namespace pixelfly
