// Work list of the Hopper weight-gradient kernel. Its outputs (the kept 64x64 tiles of dB, bordered
// by du and dv) are edges between tiles of [dz | s] and tiles of [x | t]; grad_cuts.cpp cuts them
// into chunks, and here a chunk's outputs are dealt to two warpgroups, as runs.
#include <algorithm>
#include <array>
#include <set>
#include <utility>
#include <vector>

#include "planner/grad_graph.h"
#include "planner/plan.h"

namespace pixelfly {
namespace {

using grad::Chunk;
using grad::Edge;
using grad::Graph;

Graph make_graph(const LayoutView& layout) {
  // The part of a block past the features has tiles of its own.
  const int32_t sub = layout.block_size / kGroupTile;
  Graph graph{group_tiles(layout.num_rows() * layout.block_size),
              group_tiles(layout.num_cols() * layout.block_size),
              group_tiles(layout.rank),
              {}};
  std::vector<Edge>& edges = graph.edges;
  std::set<std::pair<int32_t, int32_t>> quads;  // numbered as in row_groups.cpp
  for (int32_t k = 0; k < layout.nnz(); ++k) {
    if (sub == 0) {
      const std::pair<int32_t, int32_t> tile{layout.row_idx[k] / 2, layout.col_idx[k] / 2};
      const auto number = static_cast<int32_t>(quads.size());
      if (quads.insert(tile).second)
        edges.push_back({tile.first, tile.second, kGradBlock + number});
      continue;
    }
    for (int32_t r = 0; r < sub; ++r) {
      for (int32_t c = 0; c < sub; ++c) {
        edges.push_back({layout.row_idx[k] * sub + r, layout.col_idx[k] * sub + c,
                         kGradBlock + (k * sub + r) * sub + c});
      }
    }
  }
  for (int32_t j = 0; j < graph.rank_tiles; ++j) {
    for (int32_t r = 0; r < graph.dz_tiles; ++r) {
      edges.push_back({r, graph.x_tiles + j, kGradDu + r * graph.rank_tiles + j});
    }
    for (int32_t c = 0; c < graph.x_tiles; ++c) {
      edges.push_back({graph.dz_tiles + j, c, kGradDv + c * graph.rank_tiles + j});
    }
  }
  std::sort(edges.begin(), edges.end(), [](const Edge& a, const Edge& b) {
    return std::pair(a.row, a.col) < std::pair(b.row, b.col);
  });
  return graph;
}

// Deals the outputs of a warpgroup to runs of the given sizes: a run has one row and evenly spaced
// columns. `left` counts runs of size 1, 2 and 3 not yet made.
bool deal_runs(const std::vector<std::array<int32_t, 3>>& outputs, std::vector<bool>& used,
               std::array<int, 4>& left, std::vector<std::vector<size_t>>& runs) {
  const auto first = static_cast<size_t>(std::find(used.begin(), used.end(), false) - used.begin());
  if (first == used.size()) return true;
  const size_t n = outputs.size();
  auto attempt = [&](const std::vector<size_t>& run) {
    for (const size_t i : run) used[i] = true;
    --left[run.size()];
    runs.push_back(run);
    if (deal_runs(outputs, used, left, runs)) return true;
    runs.pop_back();
    ++left[run.size()];
    for (const size_t i : run) used[i] = false;
    return false;
  };
  auto joins = [&](size_t i) { return !used[i] && outputs[i][0] == outputs[first][0]; };
  if (left[3] > 0) {
    for (size_t i = first + 1; i < n; ++i) {
      for (size_t j = i + 1; joins(i) && j < n; ++j) {
        if (joins(j) && outputs[j][1] - outputs[i][1] == outputs[i][1] - outputs[first][1] &&
            attempt({first, i, j})) {
          return true;
        }
      }
    }
  }
  if (left[2] > 0) {
    for (size_t i = first + 1; i < n; ++i) {
      if (joins(i) && attempt({first, i})) return true;
    }
  }
  return left[1] > 0 && attempt({first});
}

// Writes the outputs {row slot, column slot, destination} of warpgroup w, sorted by row and column.
void set_outputs(GradChunk* chunk, int w, const std::vector<std::array<int32_t, 3>>& outputs) {
  chunk->num_outputs[w] = static_cast<int32_t>(outputs.size());
  for (const int32_t sizes : kGradSizes) {
    std::array<int, 4> left{};
    size_t sum = 0;
    for (int32_t rest = sizes; rest > 0; rest /= 10) {
      ++left[static_cast<size_t>(rest % 10)];
      sum += static_cast<size_t>(rest % 10);
    }
    std::vector<bool> used(outputs.size(), false);
    std::vector<std::vector<size_t>> runs;
    if (sum != outputs.size() || !deal_runs(outputs, used, left, runs)) continue;
    std::stable_sort(runs.begin(), runs.end(),
                     [](const auto& a, const auto& b) { return a.size() > b.size(); });
    chunk->sizes[w] = sizes;
    int32_t next = 0, number = 0;
    for (const std::vector<size_t>& run : runs) {
      const auto& first = outputs[run[0]];
      const int32_t step = run.size() > 1 ? outputs[run[1]][1] - first[1] : 1;
      chunk->run[w][number++] = {first[0], first[1], step, static_cast<int32_t>(run.size())};
      for (const size_t i : run) chunk->output[w][next++] = outputs[i][2];
    }
    return;
  }
}

GradChunk make_chunk(const Graph& graph, const Chunk& members) {
  // Columns in the order of the rows that use them, so that a row's columns lie side by side.
  struct Use {
    double rows = 0, count = 0;
  };
  std::vector<int32_t> rows, cols;
  for (const int32_t e : members) {
    rows.push_back(graph.edges[static_cast<size_t>(e)].row);
    cols.push_back(graph.edges[static_cast<size_t>(e)].col);
  }
  auto unique = [](std::vector<int32_t>* v) {
    std::sort(v->begin(), v->end());
    v->erase(std::unique(v->begin(), v->end()), v->end());
  };
  auto index = [](const std::vector<int32_t>& v, int32_t value) {
    return static_cast<size_t>(std::find(v.begin(), v.end(), value) - v.begin());
  };
  unique(&rows);
  unique(&cols);
  std::vector<Use> use(cols.size());
  for (const int32_t e : members) {
    const Edge& edge = graph.edges[static_cast<size_t>(e)];
    Use& u = use[index(cols, edge.col)];
    u.rows += static_cast<double>(index(rows, edge.row));
    ++u.count;
  }
  std::vector<size_t> order(cols.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return use[a].rows * use[b].count < use[b].rows * use[a].count;
  });

  GradChunk chunk{};
  for (const int32_t row : rows) {
    const bool is_s = row >= graph.dz_tiles;
    chunk.tile[chunk.num_tiles++] =
        (is_s ? row - graph.dz_tiles : row) << 2 | (is_s ? kGradS : kGradDz);
  }
  std::vector<int32_t> slot(cols.size());
  for (const size_t i : order) {
    const bool is_t = cols[i] >= graph.x_tiles;
    slot[i] = chunk.num_tiles;
    chunk.tile[chunk.num_tiles++] =
        (is_t ? cols[i] - graph.x_tiles : cols[i]) << 2 | (is_t ? kGradT : kGradX);
  }
  std::vector<std::array<int32_t, 3>> outputs;
  for (const int32_t e : members) {
    const Edge& edge = graph.edges[static_cast<size_t>(e)];
    outputs.push_back(
        {static_cast<int32_t>(index(rows, edge.row)), slot[index(cols, edge.col)], edge.output});
  }
  std::sort(outputs.begin(), outputs.end());
  const auto half = outputs.begin() + static_cast<long>((outputs.size() + 1) / 2);
  set_outputs(&chunk, 0, {outputs.begin(), half});
  set_outputs(&chunk, 1, {half, outputs.end()});
  return chunk;
}

// Every tile of dz is summed for dbias in one warpgroup of a chunk that loads it: the one with
// fewest such tiles, of several the one with fewest outputs.
void assign_bias(const Graph& graph, std::vector<GradChunk>* chunks) {
  std::vector<std::vector<std::pair<size_t, int32_t>>> loads(static_cast<size_t>(graph.dz_tiles));
  for (size_t c = 0; c < chunks->size(); ++c) {
    for (int32_t i = 0; i < (*chunks)[c].num_tiles; ++i) {
      const int32_t tile = (*chunks)[c].tile[i];
      if ((tile & 3) == kGradDz) loads[static_cast<size_t>(tile >> 2)].push_back({c, i});
    }
  }
  for (int32_t row = 0; row < graph.dz_tiles; ++row) {
    GradChunk* best = nullptr;
    int32_t index = 0;
    int best_w = 0;
    auto offer = [&](GradChunk* chunk, int32_t i) {
      for (int w = 0; w < 2; ++w) {
        if (chunk->num_bias[w] == kGradBias) continue;
        if (best == nullptr || std::pair(chunk->num_bias[w], chunk->num_outputs[w]) <
                                   std::pair(best->num_bias[best_w], best->num_outputs[best_w])) {
          best = chunk;
          best_w = w;
          index = i;
        }
      }
    };
    for (const auto& [c, i] : loads[static_cast<size_t>(row)]) offer(&(*chunks)[c], i);
    if (best == nullptr) {  // in none, or none has room: a chunk for such tiles
      const bool open = !chunks->empty() && chunks->back().num_outputs[0] == 0 &&
                        chunks->back().num_tiles < 2 * kGradBias;
      if (!open) chunks->push_back({});
      GradChunk* last = &chunks->back();
      last->tile[last->num_tiles++] = row << 2 | kGradDz;
      offer(last, last->num_tiles - 1);
    }
    best->bias[best_w][best->num_bias[best_w]++] = index;
  }
}

}  // namespace

GradSection append_grad_chunks(PlanBuilder& builder, const LayoutView& layout) {
  if (layout.block_size < 32) return {};
  const Graph graph = make_graph(layout);
  auto append = [&](const std::vector<Chunk>& cut) {
    std::vector<GradChunk> chunks;
    for (const Chunk& members : cut) chunks.push_back(make_chunk(graph, members));
    assign_bias(graph, &chunks);
    const GradLoad load = grad::load_of(graph, cut);
    return GradList{static_cast<int32_t>(chunks.size()),
                    builder.append(chunks),
                    load.loads,
                    static_cast<int32_t>(load.step_ns * 1000),
                    static_cast<int32_t>(load.spread * 1e6),
                    load.most_tiles,
                    load.most_outputs};
  };
  const grad::Cuts cuts = grad::best_cuts(graph, layout.thread_blocks);
  GradSection section{};
  section.many = append(cuts.many);
  if (cuts.few != cuts.many) section.few = append(cuts.few);
  section.num_outputs = static_cast<int32_t>(graph.edges.size());
  return section;
}

}  // namespace pixelfly
