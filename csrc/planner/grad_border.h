// Tiles of one side with far more partners than the others, s or t and dense rows or columns: the
// border of the weight gradients' graph. In the strips of grad_cuts.cpp its edges may make chunks
// too large: they can get chunks of their own, or go to those that load their other tile anyway.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "planner/grad_graph.h"

namespace pixelfly::grad {

struct Border {
  std::vector<int32_t> place;  // of a tile: its number among the border's, or -1
  int32_t tiles = 0;
};
Border border_of(const Graph& graph, bool of_rows);

// The graph's edges: those of the border's rows, those of its columns, and the others.
struct Parts {
  std::vector<int32_t> core, rows, cols;
};
Parts part(const Graph& graph, const Border& rows, const Border& cols);

// Deals edges of the border, of its rows or of its columns, to chunks that load their other tile:
// each to the one with the fewest edges among those that have room (most_outputs edges, kGradTiles
// tiles), of several to the first.
// Returns the edges that none has room for.
std::vector<int32_t> deal(const Graph& graph, const std::vector<int32_t>& edges, bool of_rows,
                          size_t most_outputs, std::vector<Chunk>* chunks);

}  // namespace pixelfly::grad
