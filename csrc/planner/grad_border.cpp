#include "planner/grad_border.h"

#include <algorithm>
#include <set>

namespace pixelfly::grad {

Border border_of(const Graph& graph, bool of_rows) {
  const auto rows = static_cast<size_t>(graph.rows());
  const size_t tiles = of_rows ? rows : static_cast<size_t>(graph.vertices()) - rows;
  std::vector<size_t> partners(tiles, 0);
  for (const Edge& edge : graph.edges) {
    ++partners[static_cast<size_t>(of_rows ? edge.row : edge.col)];
  }
  Border border;
  for (const size_t n : partners) {
    const bool many = n > kMaxOutputs && n * tiles > 2 * graph.edges.size();
    border.place.push_back(many ? border.tiles++ : -1);
  }
  return border;
}

Parts part(const Graph& graph, const Border& rows, const Border& cols) {
  Parts parts;
  for (size_t e = 0; e < graph.edges.size(); ++e) {
    const Edge& edge = graph.edges[e];
    const bool of_row = rows.tiles > 0 && rows.place[static_cast<size_t>(edge.row)] >= 0;
    const bool of_col = cols.tiles > 0 && cols.place[static_cast<size_t>(edge.col)] >= 0;
    (of_row ? parts.rows : of_col ? parts.cols : parts.core).push_back(static_cast<int32_t>(e));
  }
  return parts;
}

std::vector<int32_t> deal(const Graph& graph, const std::vector<int32_t>& edges, bool of_rows,
                          size_t most_outputs, std::vector<Chunk>* chunks) {
  std::vector<std::set<int32_t>> tiles;  // of each chunk
  std::vector<std::vector<size_t>> loading(static_cast<size_t>(graph.vertices()));
  for (size_t c = 0; c < chunks->size(); ++c) {
    const std::vector<int32_t> own = tiles_of(graph, (*chunks)[c]);
    tiles.emplace_back(own.begin(), own.end());
    for (const int32_t tile : own) loading[static_cast<size_t>(tile)].push_back(c);
  }
  std::vector<int32_t> left;
  for (const int32_t e : edges) {
    const Edge& edge = graph.edges[static_cast<size_t>(e)];
    const int32_t row = edge.row, col = graph.rows() + edge.col;
    const int32_t own = of_rows ? row : col, other = of_rows ? col : row;
    Chunk* best = nullptr;
    std::set<int32_t>* best_tiles = nullptr;
    for (const size_t c : loading[static_cast<size_t>(other)]) {
      Chunk& chunk = (*chunks)[c];
      const bool fits = chunk.size() < most_outputs &&
                        (tiles[c].count(own) > 0 || tiles[c].size() < size_t{kGradTiles});
      if (!fits || (best != nullptr && chunk.size() >= best->size())) continue;
      best = &chunk;
      best_tiles = &tiles[c];
    }
    if (best == nullptr) {
      left.push_back(e);
      continue;
    }
    best->push_back(e);
    best_tiles->insert(own);
  }
  return left;
}

}  // namespace pixelfly::grad
