// Checks every schedule the planner writes against the layout it was given. No GPU, no torch.
//
// Each schedule is read back as kernels read it and turned into a list of element-level facts
// ("this output tile gets x tile times that part of that block"), which must be the layout's facts,
// each exactly once.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/grad_checks.h"
#include "tests/group_checks.h"
#include "tests/plan_case.h"

namespace pixelfly {
namespace {

constexpr int kPiece = 32;  // the smallest block the schedules know

// (output tile, output half, x tile, x half) -> (block, stored row / 32, stored column / 32).
using Facts = std::map<std::array<int32_t, 4>, std::array<int32_t, 3>>;

// What the product must compute, in 32x32 pieces. Pieces wholly past the features are left out.
Facts product_facts(const LayoutView& layout, bool transposed) {
  Facts facts;
  const int32_t n = layout.block_size / kPiece;
  for (int32_t k = 0; k < layout.nnz(); ++k) {
    for (int32_t r = 0; r < n; ++r) {
      for (int32_t c = 0; c < n; ++c) {
        const int32_t row = layout.row_idx[k] * n + r, col = layout.col_idx[k] * n + c;
        if (row / 2 >= tiles(layout.out_features) || col / 2 >= tiles(layout.in_features)) continue;
        const int32_t out = transposed ? col : row, in = transposed ? row : col;
        facts[{out / 2, out % 2, in / 2, in % 2}] = {k, r, c};
      }
    }
  }
  return facts;
}

// Long rows first, then the others; each part ascending, every output tile once.
void check_long_rows(const LayoutView& layout, const Plan& plan, bool transposed) {
  const LongRows& rows = transposed ? plan.header.long_cols : plan.header.long_rows;
  const auto count =
      static_cast<size_t>(tiles(transposed ? layout.in_features : layout.out_features));
  std::vector<int32_t> blocks(count, 0), seen(count, 0);
  for (int32_t k = 0; k < layout.nnz(); ++k) {
    const int32_t row = transposed ? layout.col_idx[k] : layout.row_idx[k];
    for (size_t t = 0; t < count; ++t) {
      blocks[t] += static_cast<int32_t>(t) * 64 / layout.block_size == row;
    }
  }
  const auto* order = plan.at<int32_t>(rows.order_offset);
  const double mean =
      std::accumulate(blocks.begin(), blocks.end(), 0.0) / static_cast<double>(count);
  int32_t most = 0;
  for (size_t i = 0; i < count; ++i) {
    const auto tile = static_cast<size_t>(order[i]), long_rows = static_cast<size_t>(rows.count);
    ++seen[tile];
    expect((i < long_rows) == (blocks[tile] > 1.5 * mean), "long rows first");
    expect(i == 0 || i == long_rows || order[i - 1] < order[i], "in ascending order");
    if (i >= long_rows) most = std::max(most, blocks[tile]);
  }
  expect(std::count(seen.begin(), seen.end(), 1) == static_cast<int64_t>(count), "each tile once");
  expect(most == rows.most_others, "the longest of the others");
}

void check_index(const LayoutView& layout, const Plan& plan) {
  const PlanHeader& h = plan.header;
  expect(h.magic == kPlanMagic && h.version == kPlanVersion, "magic and version");
  expect(h.size == static_cast<int32_t>(plan.words.size()), "size");
  expect(h.nnz == layout.nnz() && h.rank == layout.rank, "nnz and rank");
  expect(h.thread_blocks == layout.thread_blocks, "thread blocks");
  const auto* row_ptr = plan.at<int32_t>(h.row_ptr_offset);
  const auto* col_ptr = plan.at<int32_t>(h.col_ptr_offset);
  const auto* cols = plan.at<int32_t>(h.col_idx_offset);
  const auto* rows = plan.at<int32_t>(h.row_idx_offset);
  const auto* t_row = plan.at<int32_t>(h.t_row_offset);
  const auto* t_block = plan.at<int32_t>(h.t_block_offset);
  int32_t most_row = 0, most_col = 0;
  for (int32_t i = 0; i < h.num_rows; ++i) {
    most_row = std::max(most_row, row_ptr[i + 1] - row_ptr[i]);
    for (int32_t k = row_ptr[i]; k < row_ptr[i + 1]; ++k) {
      expect(rows[k] == i && layout.row_idx[k] == i && layout.col_idx[k] == cols[k], "row index");
    }
  }
  std::set<int32_t> seen;
  for (int32_t j = 0; j < h.num_cols; ++j) {
    most_col = std::max(most_col, col_ptr[j + 1] - col_ptr[j]);
    for (int32_t k = col_ptr[j]; k < col_ptr[j + 1]; ++k) {
      const int32_t block = t_block[k];
      expect(layout.col_idx[block] == j && layout.row_idx[block] == t_row[k], "transposed index");
      expect(seen.insert(block).second, "a block twice in the transposed index");
    }
  }
  expect(row_ptr[h.num_rows] == h.nnz && col_ptr[h.num_cols] == h.nnz, "index ends");
  expect(h.max_row_blocks == most_row && h.max_col_blocks == most_col, "longest row and column");
}

// Adds what a weight tile of the blocks contributes to an output tile.
void add_weight(const Plan& plan, const GroupSection& s, bool transposed, int32_t out_tile,
                int32_t x_tile, int32_t weight, Facts* facts) {
  const int32_t b = plan.header.block_size;
  for (int32_t out = 0; out < 2; ++out) {
    for (int32_t in = 0; in < 2; ++in) {
      std::array<int32_t, 3> source;
      if (b == 32) {
        const int32_t block = plan.at<GroupQuad>(s.quads_offset)[weight].block[2 * in + out];
        if (block < 0) continue;
        source = {block, 0, 0};
      } else {
        const int32_t sub = b / 64, shift = b == 128 ? 1 : 0;
        // As schedule.h describes: rows and columns of the stored [nnz * b, b] matrix.
        const int32_t first_row = (weight >> shift) * 64, first_col = (weight % sub) * 64;
        const int32_t row = first_row / 32 + (transposed ? in : out);
        const int32_t col = first_col / 32 + (transposed ? out : in);
        source = {row / (b / 32), row % (b / 32), col};
      }
      const bool fresh = facts->insert({{out_tile, out, x_tile, in}, source}).second;
      expect(fresh, "a piece of the product twice");
    }
  }
}

void check_product(const LayoutView& layout, const Plan& plan, bool transposed, bool few) {
  const GroupSection& s = section_of(plan.header, transposed, few);
  if (layout.block_size == 16) expect(s.num_groups == 0, "block size 16 has no row groups");
  if (layout.block_size == 16 || (few && s.num_groups == 0)) return;
  expect(s.num_groups > 0, "row groups");
  const int32_t out_tiles = tiles(transposed ? layout.in_features : layout.out_features);
  const int32_t x_tiles = tiles(transposed ? layout.out_features : layout.in_features);
  const auto* groups = plan.at<RowGroup>(s.groups_offset);
  const auto* steps = plan.at<GroupStep>(s.steps_offset);
  Facts facts;
  std::vector<int32_t> times(static_cast<size_t>(out_tiles), 0);
  int32_t most = 0, most_steps = 0, resident = 0;
  std::vector<int32_t> weights, in_shared;  // of each group, and without those in registers
  for (int32_t g = 0; g < s.num_groups; ++g) {
    int32_t slot = 0;
    std::set<int32_t> ranks[2], seen;
    for (int i = 0; i < 2; ++i) {
      const int32_t row = groups[g].rows[i];
      if (row < 0 && i == 1) continue;
      expect(row >= 0 && row < out_tiles, "output tile in range");
      ++times[static_cast<size_t>(row)];
    }
    for (int32_t k = groups[g].step_begin; k < groups[g].step_end; ++k) {
      const GroupStep& step = steps[k];
      expect(seen.insert(step.x_tile).second, "an x tile is loaded once per group");
      expect(step.slot == slot, "slot counts the weight tiles before");
      for (int i = 0; i < 2; ++i) {
        if (step.weight[i] < 0) continue;
        ++slot;
        expect(groups[g].rows[i] >= 0, "no weights for an absent row");
        if (step.x_tile >= x_tiles) {
          ranks[i].insert(step.x_tile - x_tiles);
        } else {
          add_weight(plan, s, transposed, groups[g].rows[i], step.x_tile, step.weight[i], &facts);
        }
      }
    }
    if (slot > most) {
      most = slot;
      most_steps = groups[g].step_end - groups[g].step_begin;
    }
    weights.push_back(slot);
    const int32_t steps_in_shared = groups[g].step_end - groups[g].step_begin - s.register_steps;
    expect(steps_in_shared >= 0, "as many steps as stay in registers");
    in_shared.push_back(s.register_steps == 0 ? slot
                                              : steps[groups[g].step_begin + steps_in_shared].slot);
    for (int i = 0; i < 2; ++i) {
      const int32_t want = groups[g].rows[i] < 0 ? 0 : tiles(layout.rank);
      expect(static_cast<int32_t>(ranks[i].size()) == want, "every tile of t for every row");
    }
  }
  expect(most == s.max_weights && most_steps == s.max_steps, "the largest group");
  expect(std::all_of(times.begin(), times.end(), [](int32_t n) { return n == 1; }),
         "every output tile in exactly one group");
  // Pieces past the features in the last tiles may be computed: they are masked.
  for (const auto& [key, source] : product_facts(layout, transposed)) {
    const auto at = facts.find(key);
    expect(at != facts.end() && at->second == source, "a kept block is in the schedule");
    if (at != facts.end()) facts.erase(at);
  }
  expect(facts.empty(), "nothing but kept blocks is in the schedule");

  expect(s.ahead_blocks >= 0 && s.ahead_blocks <= layout.thread_blocks / 3, "blocks that form t");
  expect(s.ahead_blocks % 2 == 0, "neighbours stay neighbours");
  expect(s.ahead_blocks == 0 || (layout.rank > 0 && layout.rank <= kGroupTile), "one tile of t");
  // Every token tile of every group in exactly one unit, however many there are.
  std::vector<char> stay(static_cast<size_t>(s.num_groups), 0);
  for (const auto& [offset, count] : unit_lists(plan.header, transposed, few)) {
    const auto* units = plan.at<GroupUnit>(offset);
    expect(count > 0 && count % (layout.thread_blocks - s.ahead_blocks) == 0,
           "whole turns of the others");
    for (const int32_t token_tiles : {1, 2, 7, 32, 64, 128, 197}) {
      std::vector<int32_t> covered(static_cast<size_t>(s.num_groups * token_tiles), 0);
      for (int32_t i = 0; i < count; ++i) {
        const GroupUnit& u = units[i];
        if (u.begin == u.end) continue;
        const auto g = static_cast<size_t>(u.group);
        stay[g] = u.weights != kGroupStreams;
        expect(u.stages > 0 && u.stages <= kMaxGroupStages, "stages that there are");
        expect(!stay[g] || (u.weights == in_shared[g] && u.weights <= kGroupResidentTiles),
               "a unit's weights");
        const int32_t begin = token_tiles * u.begin / u.parts, end = token_tiles * u.end / u.parts;
        for (int32_t tile = begin + u.lane; tile < end; tile += u.lanes) {
          ++covered[static_cast<size_t>(u.group * token_tiles + tile)];
        }
      }
      expect(std::all_of(covered.begin(), covered.end(), [](int32_t n) { return n == 1; }),
             "every token tile of a group in exactly one unit");
    }
  }
  for (size_t g = 0; g < stay.size(); ++g) {
    if (stay[g]) resident = std::max(resident, weights[g]);
  }
  expect(resident == s.resident_weights, "the largest group that stays");
  expect(s.dense_groups >= 0 && s.dense_groups <= s.num_groups, "dense groups");
}

// Whether there is a schedule of all rows at once, and that it is the layout's.
void check_all_rows(const LayoutView& layout, const Plan& plan, bool transposed) {
  const AllRowsSection& s = transposed ? plan.header.transposed_all : plan.header.forward_all;
  const int32_t out_tiles = tiles(transposed ? layout.in_features : layout.out_features);
  const int32_t x_tiles = tiles(transposed ? layout.out_features : layout.in_features);
  const Facts want = product_facts(layout, transposed);
  std::set<int32_t> rows, reads;
  for (const auto& [key, source] : want) {
    rows.insert(key[0]);
    reads.insert(key[2]);
  }
  const bool served = layout.block_size >= 64 && x_tiles <= 128 && layout.rank <= 64 &&
                      out_tiles <= (layout.rank > 0 ? 12 : 18) &&
                      (layout.rank > 0 || static_cast<int32_t>(rows.size()) == out_tiles);
  expect((s.parts > 0) == served, "a schedule of all rows where it serves");
  if (!served) return;
  expect(s.parts == std::max(2, (out_tiles + 5) / 6), "six rows for a thread block");
  expect(s.num_columns == (layout.rank > 0 ? x_tiles : static_cast<int32_t>(reads.size())),
         "the tiles of x that are read");
  Facts facts;
  std::set<int32_t> made;
  int32_t products = 0;
  for (int32_t p = 0; p < s.parts; ++p) {
    const AllRowsPart& part = plan.at<AllRowsPart>(s.parts_offset)[p];
    for (int w = 0; w < 2; ++w) {
      const auto* weights = plan.at<int32_t>(part.steps_offset[w]);
      for (const int32_t row : part.rows[w]) {
        if (row >= 0) expect(row < out_tiles && made.insert(row).second, "an output tile once");
      }
      int32_t next = 0, previous = -1;
      for (int32_t c = 0; c < s.num_columns; ++c) {
        const AllRowsColumn& column = plan.at<AllRowsColumn>(s.columns_offset)[c];
        expect(column.x_tile > previous && column.x_tile < x_tiles, "x in ascending order");
        previous = column.x_tile;
        for (int i = 0; i < kAllRowsOutputs; ++i) {
          if (!(column.uses >> (kAllRowsOutputs * (2 * p + w) + i) & 1)) continue;
          expect(part.rows[w][i] >= 0, "no products for an absent row");
          add_weight(plan, plan.header.forward, transposed, part.rows[w][i], column.x_tile,
                     weights[next++], &facts);
        }
      }
      expect(next == part.num_weights[w], "as many weight tiles as products");
      for (int i = 0; i < kAllRowsOutputs; ++i) {
        const bool any = i < part.num_rows[w];
        expect(any ? weights[next + i] == ~part.rows[w][i] : part.rows[w][i] == -1,
               "then the rows");
      }
      products += next;
    }
  }
  expect(products == s.num_products, "the number of products");
  expect(static_cast<int32_t>(made.size()) == out_tiles, "every output tile");
  for (const auto& [key, source] : want) {
    const auto at = facts.find(key);
    expect(at != facts.end() && at->second == source,
           "a kept block is in the schedule of all rows");
    if (at != facts.end()) facts.erase(at);
  }
  expect(facts.empty(), "nothing but kept blocks is in the schedule of all rows");
}

// Rows are dealt out evenly where they can be.
void check_all_rows_balance() {
  g_case = "768 outputs, all rows";
  for (const bool dense : {false, true}) {
    const Plan plan(make(12, 48, 64, 0, 0, [&](int32_t i, int32_t j) {
      return butterfly(i, j / 4) || (dense && (i == 0 || j == 0));
    }));
    const AllRowsSection& s = plan.header.forward_all;
    int32_t most = 0;
    for (int32_t p = 0; p < s.parts; ++p) {
      const AllRowsPart& part = plan.at<AllRowsPart>(s.parts_offset)[p];
      most = std::max(most, part.num_weights[0] + part.num_weights[1]);
      if (!dense) expect(part.num_weights[0] == 52 && part.num_weights[1] == 52, "52 of 208 each");
    }
    // 48 of the dense row, and the five shortest of the others.
    if (dense) expect(most <= 135, "the part with the dense row");
  }
}

void check(const std::string& name, const LayoutView& layout) {
  g_case = name;
  const Plan plan(layout);
  check_index(layout, plan);
  for (const bool transposed : {false, true}) check_long_rows(layout, plan, transposed);
  for (const bool transposed : {false, true}) {
    check_all_rows(layout, plan, transposed);
    for (const bool few : {false, true}) check_product(layout, plan, transposed, few);
  }
  check_grad(layout, plan);
}

void check_bad_layouts() {
  const auto rejected = [](const std::string& name, const LayoutView& layout) {
    g_case = name;
    try {
      build_plan(layout);
    } catch (const std::invalid_argument&) {
      return;
    }
    expect(false, "std::invalid_argument");
  };
  rejected("no features", {0, 64, 64, 0, {}, {}});
  rejected("negative rank", {64, 64, 64, -1, {0}, {0}});
  rejected("one index longer", {64, 64, 64, 0, {0}, {}});
  rejected("outside the grid", {64, 64, 64, 0, {0}, {1}});
  rejected("a block twice", {64, 64, 64, 0, {0, 0}, {0, 0}});
  rejected("no thread blocks", {64, 64, 64, 0, {0}, {0}, 0});
  rejected("not row-major", {128, 128, 64, 0, {1, 0}, {0, 0}});
}

}  // namespace
}  // namespace pixelfly

int main() {
  using namespace pixelfly;
  std::mt19937 random(20211130);
  int cases = 0;
  for (const int32_t b : {16, 32, 64, 128}) {
    for (const int32_t rank : {0, 8, 64, 72, 200}) {
      for (const int32_t tail : {0, 8, b - 8}) {
        const std::string tag = " b=" + std::to_string(b) + " rank=" + std::to_string(rank) +
                                " tail=" + std::to_string(tail);
        const auto run = [&](const char* name, int32_t rows, int32_t cols, auto keep) {
          check(name + tag, make(rows, cols, b, rank, tail, keep));
          ++cases;
        };
        run("butterfly", 16, 16, butterfly);
        run("butterfly 12", 12, 12, butterfly);
        run("wide", 4, 16, [](int32_t i, int32_t j) { return butterfly(i, j / 4); });
        run("tall", 16, 4, [](int32_t i, int32_t j) { return butterfly(i / 4, j); });
        run("global", 16, 16, [](int32_t i, int32_t j) { return !i || !j || butterfly(i, j); });
        run("global 40", 40, 40, [](int32_t i, int32_t j) { return !i || !j || butterfly(i, j); });
        run("dense", 5, 7, [](int32_t, int32_t) { return true; });
        run("empty", 3, 5, [](int32_t, int32_t) { return false; });
        run("single", 1, 1, [](int32_t, int32_t) { return true; });
        run("one column", 9, 9, [](int32_t, int32_t j) { return j == 4; });
        run("one row", 9, 9, [](int32_t i, int32_t) { return i == 4; });
        run("empty rows", 8, 6, [](int32_t i, int32_t j) { return i % 2 && (i + j) % 3; });
        for (const double density : {0.05, 0.3, 0.8}) {
          std::bernoulli_distribution coin(density);
          const auto rows = static_cast<int32_t>(1 + random() % 20);
          const auto cols = static_cast<int32_t>(1 + random() % 20);
          run("random", rows, cols, [&](int32_t, int32_t) { return coin(random); });
        }
      }
    }
  }
  check("128 x 128 butterfly", make(128, 128, 64, 64, 0, butterfly));
  check("256 x 256 butterfly", make(256, 256, 32, 64, 0, butterfly));
  check("64 x 40 dense", make(64, 40, 64, 0, 0, [](int32_t, int32_t) { return true; }));
  for (const int32_t thread_blocks : {1, 7, 78, 114, 124, 132, 148}) {
    for (LayoutView layout : {make(24, 24, 64, 64, 0, butterfly), make(64, 64, 64, 0, 0, global)}) {
      layout.thread_blocks = thread_blocks;
      check("for " + std::to_string(thread_blocks) + " thread blocks", layout);
      ++cases;
    }
  }
  check_dense_row();
  check_whole_tiles();
  check_pairs();
  check_registers();
  check_lanes();
  check_all_rows_balance();
  check_few_tokens();
  check_turns();
  check_rest();
  check_early_start();
  check_order();
  check_grad_choice();
  check_grad_border();
  check_bad_layouts();
  if (g_failures) {
    std::printf("%d checks failed\n", g_failures);
    return 1;
  }
  std::printf("planner: %d layouts, all schedules agree with them\n", cases + 3);
  return 0;
}
