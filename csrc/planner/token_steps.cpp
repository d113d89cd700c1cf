// Schedule of the token-stationary product: which warpgroup computes which output tiles, in which
// order the weight tiles stream by, and when a tile of x is no longer needed.
#include <algorithm>
#include <limits>
#include <vector>

#include "planner/plan.h"

namespace pixelfly {
namespace {

// Past this many x tiles they no longer fit in shared memory beside a useful weight ring.
constexpr int32_t kMaxTiles = 20;

int32_t tiles(int32_t features) { return (features + kTokenTile - 1) / kTokenTile; }

// The 64x64 weight tiles of every output tile, in ascending order of the x tile.
std::vector<std::vector<TokenStep>> output_rows(const LayoutView& layout, bool transposed) {
  const int32_t sub = layout.block_size / kTokenTile;
  const int32_t out_tiles = tiles(transposed ? layout.in_features : layout.out_features);
  const int32_t x_tiles = tiles(transposed ? layout.out_features : layout.in_features);
  std::vector<std::vector<TokenStep>> rows(static_cast<size_t>(out_tiles));
  for (int32_t k = 0; k < layout.nnz(); ++k) {
    const int32_t out = transposed ? layout.col_idx[k] : layout.row_idx[k];
    const int32_t in = transposed ? layout.row_idx[k] : layout.col_idx[k];
    for (int32_t o = out * sub; o < std::min((out + 1) * sub, out_tiles); ++o) {
      for (int32_t x = in * sub; x < std::min((in + 1) * sub, x_tiles); ++x) {
        const int32_t row_half = (transposed ? x : o) % sub, col_half = (transposed ? o : x) % sub;
        rows[static_cast<size_t>(o)].push_back(
            {x, col_half * kTokenTile, k * layout.block_size + row_half * kTokenTile, 0});
      }
    }
  }
  for (auto& row : rows) {
    std::stable_sort(row.begin(), row.end(),
                     [](const TokenStep& a, const TokenStep& b) { return a.x_tile < b.x_tile; });
  }
  return rows;
}

// Marks each list's last use of every x tile, and counts the lists that use it.
std::vector<int32_t> mark_releases(std::vector<std::vector<TokenStep>>& lists, int32_t num_tiles) {
  std::vector<int32_t> users(static_cast<size_t>(num_tiles), 0);
  for (auto& list : lists) {
    std::vector<TokenStep*> last(static_cast<size_t>(num_tiles), nullptr);
    for (auto& step : list) {
      if (!(step.flags & kTokenNoProduct)) last[static_cast<size_t>(step.x_tile)] = &step;
    }
    for (size_t x = 0; x < last.size(); ++x) {
      if (last[x] == nullptr) continue;
      last[x]->flags |= kTokenRelease;
      ++users[x];
    }
  }
  return users;
}

// The x tiles in the order in which the lists, advancing together, first need them.
std::vector<int32_t> load_order(const std::vector<std::vector<TokenStep>>& lists,
                                int32_t num_tiles) {
  std::vector<size_t> first(static_cast<size_t>(num_tiles), std::numeric_limits<size_t>::max());
  for (const auto& list : lists) {
    for (size_t i = 0; i < list.size(); ++i) {
      if (list[i].flags & (kTokenNoProduct | kTokenFactorOut)) continue;
      auto& at = first[static_cast<size_t>(list[i].x_tile)];
      at = std::min(at, i);
    }
  }
  std::vector<int32_t> order;
  for (int32_t x = 0; x < num_tiles; ++x) {
    if (first[static_cast<size_t>(x)] != std::numeric_limits<size_t>::max()) order.push_back(x);
  }
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return first[static_cast<size_t>(a)] < first[static_cast<size_t>(b)];
  });
  return order;
}

}  // namespace

TokenSection append_token_steps(PlanBuilder& builder, const LayoutView& layout, bool transposed) {
  TokenSection section{};
  const int32_t x_tiles = tiles(transposed ? layout.out_features : layout.in_features);
  const bool served = layout.block_size == 64 || layout.block_size == 128;
  if (!served || x_tiles > kMaxTiles || layout.rank > kTokenTile) return section;

  auto rows = output_rows(layout, transposed);
  std::vector<std::vector<TokenStep>> lists(kTokenWarpgroups);
  if (layout.rank > 0) {  // the t tile is made first, by the first warpgroup
    for (int32_t x = 0; x < x_tiles; ++x) {
      const int32_t col = transposed ? 0 : x * kTokenTile, row = transposed ? x * kTokenTile : 0;
      lists[0].push_back({x, col, row, kTokenFactorIn});
    }
    lists[0].front().flags |= kTokenRowBegin;
    lists[0].back().flags |= kTokenRowEnd;
  }
  for (int32_t o = 0; o < static_cast<int32_t>(rows.size()); ++o) {
    auto& row = rows[static_cast<size_t>(o)];
    if (layout.rank > 0) {
      const int32_t col = transposed ? o * kTokenTile : 0, r = transposed ? 0 : o * kTokenTile;
      row.push_back({x_tiles, col, r, kTokenFactorOut});
    }
    if (row.empty()) row.push_back({0, 0, 0, kTokenNoProduct});
    row.front().flags |= kTokenRowBegin;
    row.back().flags |= kTokenRowEnd;
    auto& list = *std::min_element(lists.begin(), lists.end(), [](const auto& a, const auto& b) {
      return a.size() < b.size();
    });
    for (auto& step : row) {
      step.flags |= o << kTokenRowShift;
      list.push_back(step);
    }
  }

  const auto users = mark_releases(lists, x_tiles + 1);
  std::vector<TokenLoad> loads;
  for (int32_t x : load_order(lists, x_tiles)) loads.push_back({x, users[static_cast<size_t>(x)]});
  std::vector<TokenStep> steps;
  for (size_t w = 0; w < lists.size(); ++w) {
    section.num_steps[w] = static_cast<int32_t>(lists[w].size());
    steps.insert(steps.end(), lists[w].begin(), lists[w].end());
  }
  section.num_x_tiles = x_tiles;
  section.t_users = users[static_cast<size_t>(x_tiles)];
  section.steps_offset = builder.append(steps);
  section.loads_offset = builder.append(loads);
  section.num_loads = static_cast<int32_t>(loads.size());
  return section;
}

}  // namespace pixelfly
