// What the weight-gradient kernel computes, as a graph: see grad_chunks.cpp.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "pixelfly/grad_spans.h"

namespace pixelfly::grad {

struct Edge {
  int32_t row;  // tile of dz; from dz_tiles on: of s
  int32_t col;  // tile of x; from x_tiles on: of t
  int32_t output;
};

struct Graph {
  int32_t dz_tiles, x_tiles, rank_tiles;
  std::vector<Edge> edges;  // row by row
  int32_t rows() const { return dz_tiles + rank_tiles; }
  int32_t vertices() const { return rows() + x_tiles + rank_tiles; }
};

using Chunk = std::vector<int32_t>;               // indices of edges
constexpr size_t kMaxOutputs = 2 * kGradOutputs;  // of a chunk

// The distinct tiles that a chunk's products need, as vertices in ascending order: rows, then
// columns.
inline std::vector<int32_t> tiles_of(const Graph& graph, const Chunk& chunk) {
  std::vector<int32_t> tiles;
  for (const int32_t e : chunk) {
    tiles.push_back(graph.edges[static_cast<size_t>(e)].row);
    tiles.push_back(graph.rows() + graph.edges[static_cast<size_t>(e)].col);
  }
  std::sort(tiles.begin(), tiles.end());
  tiles.erase(std::unique(tiles.begin(), tiles.end()), tiles.end());
  return tiles;
}

// What the model of the kernel's time takes of a cut.
GradLoad load_of(const Graph& graph, const std::vector<Chunk>& chunks);

// Cuts of the edges into the chunks that the model (pixelfly/grad_spans.h) expects to be fastest on
// so many thread blocks.
struct Cuts {
  std::vector<Chunk> many, few;  // for many tokens and for few
};
Cuts best_cuts(const Graph& graph, int thread_blocks);

}  // namespace pixelfly::grad
