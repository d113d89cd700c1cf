#include "planner/tile_rows.h"

#include <algorithm>
#include <map>

namespace pixelfly {
namespace {

void sort_by_x(std::vector<Row>& rows) {
  for (auto& row : rows) {
    std::sort(row.begin(), row.end(),
              [](const Entry& a, const Entry& b) { return a.x_tile < b.x_tile; });
  }
}

}  // namespace

std::vector<Row> quad_rows(const LayoutView& layout, bool transposed,
                           std::vector<GroupQuad>& quads) {
  const int32_t out_tiles = group_tiles(transposed ? layout.in_features : layout.out_features);
  std::vector<Row> rows(static_cast<size_t>(out_tiles));
  std::map<std::pair<int32_t, int32_t>, size_t> known;
  for (int32_t k = 0; k < layout.nnz(); ++k) {
    const int32_t out = transposed ? layout.col_idx[k] : layout.row_idx[k];
    const int32_t in = transposed ? layout.row_idx[k] : layout.col_idx[k];
    const auto [at, fresh] = known.try_emplace({out / 2, in / 2}, quads.size());
    if (fresh) {
      rows[static_cast<size_t>(out / 2)].push_back({in / 2, static_cast<int32_t>(quads.size())});
      quads.push_back({{-1, -1, -1, -1}});
    }
    quads[at->second].block[in % 2 * 2 + out % 2] = k;
  }
  sort_by_x(rows);
  return rows;
}

std::vector<Row> tile_rows(const LayoutView& layout, bool transposed) {
  const int32_t sub = layout.block_size / kGroupTile;
  const int32_t out_tiles = group_tiles(transposed ? layout.in_features : layout.out_features);
  const int32_t x_tiles = group_tiles(transposed ? layout.out_features : layout.in_features);
  std::vector<Row> rows(static_cast<size_t>(out_tiles));
  for (int32_t k = 0; k < layout.nnz(); ++k) {
    const int32_t out = transposed ? layout.col_idx[k] : layout.row_idx[k];
    const int32_t in = transposed ? layout.row_idx[k] : layout.col_idx[k];
    for (int32_t o = out * sub; o < std::min((out + 1) * sub, out_tiles); ++o) {
      for (int32_t x = in * sub; x < std::min((in + 1) * sub, x_tiles); ++x) {
        const int32_t stored_row = (transposed ? x : o) % sub,
                      stored_col = (transposed ? o : x) % sub;
        rows[static_cast<size_t>(o)].push_back({x, (k * sub + stored_row) * sub + stored_col});
      }
    }
  }
  sort_by_x(rows);
  return rows;
}

}  // namespace pixelfly
