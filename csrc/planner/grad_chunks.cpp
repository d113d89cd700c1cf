// Work list of the Hopper weight-gradient kernel. Its outputs (the kept 64x64 tiles of dB, bordered
// by du and dv) are edges between tiles of [dz | s] and tiles of [x | t]; a thread block that holds
// some of them loads every tile they touch, so chunks are grown to have many edges between few
// tiles: 12 between 4 + 4 in a butterfly, 12 between 3 + 4 where rows share their columns.
#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "pixelfly/grad_spans.h"
#include "planner/plan.h"

namespace pixelfly {
namespace {

constexpr int32_t kTile = 64;
constexpr int kPlannedSteps[] = {256, 512, 1024};  // 8192, 16384 and 32768 tokens
constexpr size_t kMaxOutputs = 2 * kGradOutputs;

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

size_t up(size_t n, size_t d) { return (n + d - 1) / d; }
int32_t tiles(int32_t features) { return (features + kTile - 1) / kTile; }

Graph make_graph(const LayoutView& layout) {
  // The part of a block past the features has tiles of its own.
  const int32_t sub = layout.block_size / kTile;
  Graph graph{tiles(layout.num_rows() * layout.block_size),
              tiles(layout.num_cols() * layout.block_size),
              tiles(layout.rank),
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

using Chunk = std::vector<int32_t>;  // indices of edges

// Cuts the edges into chunks of at most `max_edges` edges between at most `max_tiles` tiles.
class Grower {
 public:
  Grower(const Graph& graph, int32_t max_edges, int32_t max_tiles)
      : graph_(graph),
        max_edges_(static_cast<size_t>(max_edges)),
        max_tiles_(static_cast<size_t>(max_tiles)),
        incident_(static_cast<size_t>(graph.vertices())),
        taken_(graph.edges.size(), false),
        gain_(static_cast<size_t>(graph.vertices()), 0),
        inside_(static_cast<size_t>(graph.vertices()), false),
        left_(static_cast<size_t>(graph.rows()), 0) {
    for (size_t e = 0; e < graph.edges.size(); ++e) {
      ++left_[row_of(e)];
      incident_[row_of(e)].push_back(e);
      incident_[col_of(e)].push_back(e);
    }
  }

  std::vector<Chunk> grow() {
    std::vector<Chunk> pieces;
    for (size_t seed = next_seed(); seed != kNone; seed = next_seed()) {
      pieces.push_back(grow_from(seed));
    }
    return pack(pieces);
  }

 private:
  size_t row_of(size_t e) const { return static_cast<size_t>(graph_.edges[e].row); }
  size_t col_of(size_t e) const { return static_cast<size_t>(graph_.rows() + graph_.edges[e].col); }
  // Of the row that has most edges left, the edge nearest to the diagonal: pieces of the same kind
  // come one after another, and a piece does not break up those of its neighbours.
  size_t next_seed() const {
    const auto row =
        static_cast<size_t>(std::max_element(left_.begin(), left_.end()) - left_.begin());
    if (left_.empty() || left_[row] == 0) return kNone;
    size_t best = kNone;
    for (const size_t e : incident_[row]) {
      if (!taken_[e] && (best == kNone || distance(col_of(e), row) < distance(col_of(best), row))) {
        best = e;
      }
    }
    return best;
  }
  // Between two tiles, as parts of their sides.
  double distance(size_t a, size_t b) const {
    auto place = [&](size_t v) {
      const auto rows = static_cast<size_t>(graph_.rows());
      return v < rows
                 ? (static_cast<double>(v) + .5) / static_cast<double>(rows)
                 : (static_cast<double>(v - rows) + .5) / static_cast<double>(gain_.size() - rows);
    };
    return std::abs(place(a) - place(b));
  }

  // A connected piece around an edge.
  Chunk grow_from(size_t seed) {
    Chunk chunk;
    std::vector<size_t> members;
    reached_.clear();
    auto add = [&](size_t v) {
      inside_[v] = true;
      members.push_back(v);
      for (const size_t e : incident_[v]) {
        if (taken_[e]) continue;
        const size_t other = row_of(e) == v ? col_of(e) : row_of(e);
        if (!inside_[other]) {
          if (gain_[other]++ == 0) reached_.push_back(other);
        } else if (chunk.size() < max_edges_) {
          taken_[e] = true;
          --left_[row_of(e)];
          chunk.push_back(static_cast<int32_t>(e));
        }
      }
    };
    add(row_of(seed));
    add(col_of(seed));
    while (chunk.size() < max_edges_ && members.size() < max_tiles_) {
      const size_t best = best_of(max_edges_ - chunk.size(), row_of(seed), col_of(seed));
      if (best == kNone) break;
      add(best);
    }
    for (const size_t v : members) inside_[v] = false;
    for (const size_t v : reached_) gain_[v] = 0;
    return chunk;
  }

  // The tile that adds most edges, at most `room`; of several the nearest to `row` or `col`.
  size_t best_of(size_t room, size_t row, size_t col) const {
    size_t best = kNone;
    double best_distance = 0;
    for (const size_t v : reached_) {
      if (inside_[v] || gain_[v] > room) continue;
      const double away = distance(v, v < static_cast<size_t>(graph_.rows()) ? row : col);
      if (best == kNone || gain_[v] > gain_[best] ||
          (gain_[v] == gain_[best] && std::pair(away, best) < std::pair(best_distance, v))) {
        best = v;
        best_distance = away;
      }
    }
    return best;
  }

  // Joins connected pieces to chunks: each to the open one it shares most tiles with.
  std::vector<Chunk> pack(const std::vector<Chunk>& pieces) const {
    std::vector<Chunk> chunks;
    std::vector<std::set<size_t>> members;  // of each chunk: its tiles
    std::vector<size_t> open;
    for (const Chunk& piece : pieces) {
      std::set<size_t> tiles;
      for (const int32_t e : piece) {
        tiles.insert(row_of(static_cast<size_t>(e)));
        tiles.insert(col_of(static_cast<size_t>(e)));
      }
      size_t best = kNone, best_shared = 0;
      for (const size_t c : open) {
        size_t shared = 0;
        for (const size_t v : tiles) shared += members[c].count(v);
        const bool fits = chunks[c].size() + piece.size() <= max_edges_ &&
                          members[c].size() + tiles.size() - shared <= max_tiles_;
        if (fits && (best == kNone || shared > best_shared)) {
          best = c;
          best_shared = shared;
        }
      }
      if (best == kNone) {
        best = chunks.size();
        chunks.emplace_back();
        members.emplace_back();
        open.push_back(best);
      }
      chunks[best].insert(chunks[best].end(), piece.begin(), piece.end());
      members[best].insert(tiles.begin(), tiles.end());
      if (chunks[best].size() == max_edges_ || members[best].size() + 1 >= max_tiles_) {
        open.erase(std::find(open.begin(), open.end(), best));
      }
    }
    return chunks;
  }

  static constexpr size_t kNone = ~size_t{0};
  const Graph& graph_;
  const size_t max_edges_, max_tiles_;
  std::vector<std::vector<size_t>> incident_;  // edges of a vertex: rows, then columns
  std::vector<bool> taken_;
  std::vector<size_t> gain_;  // edges a vertex would add to the chunk
  std::vector<bool> inside_;
  std::vector<size_t> reached_;
  std::vector<int32_t> left_;  // edges of a row not yet taken
};

// The number of distinct tiles that a chunk's products need.
int32_t tiles_of(const Graph& graph, const Chunk& chunk) {
  std::set<int32_t> rows, cols;
  for (const int32_t e : chunk) {
    rows.insert(graph.edges[static_cast<size_t>(e)].row);
    cols.insert(graph.edges[static_cast<size_t>(e)].col);
  }
  return static_cast<int32_t>(rows.size() + cols.size());
}

GradLoad load_of(const Graph& graph, const std::vector<Chunk>& chunks) {
  GradLoad load{static_cast<int32_t>(chunks.size()),
                static_cast<int32_t>(graph.edges.size()),
                graph.vertices(),
                0,
                0,
                0};
  double tiles_squared = 0, outputs_squared = 0;
  for (const Chunk& chunk : chunks) {
    const int32_t tiles = tiles_of(graph, chunk);
    const double outputs = static_cast<double>(chunk.size());
    load.loads += tiles;
    load.step_ns = std::max(load.step_ns, grad_step_ns(tiles, outputs));
    tiles_squared += static_cast<double>(tiles) * tiles;
    outputs_squared += outputs * outputs;
  }
  if (chunks.empty()) return load;
  // Standard deviation over mean.
  auto variation = [&](double sum, double squared) {
    const double n = static_cast<double>(chunks.size());
    return std::sqrt(std::max(0., n * squared / (sum * sum) - 1));
  };
  load.spread =
      grad_spread(variation(load.loads, tiles_squared), variation(load.outputs, outputs_squared));
  return load;
}

// Cuts strips of `width` tiles of one side, each evenly: a strip's tiles of the other side are
// dealt over as few chunks as hold them, those with the same partners in turn.
std::vector<Chunk> strips(const Graph& graph, int32_t width, bool of_rows) {
  std::vector<std::map<int32_t, Chunk>> members;  // of a strip: edges by tile of the other side
  for (size_t e = 0; e < graph.edges.size(); ++e) {
    const Edge& edge = graph.edges[e];
    const auto strip = static_cast<size_t>((of_rows ? edge.row : edge.col) / width);
    if (strip >= members.size()) members.resize(strip + 1);
    members[strip][of_rows ? edge.col : edge.row].push_back(static_cast<int32_t>(e));
  }
  std::vector<Chunk> chunks;
  for (const auto& strip : members) {
    // Tiles with the same partners, by the partners' places in the strip.
    std::map<std::vector<int32_t>, std::vector<const Chunk*>> kinds;
    size_t edges = 0;
    for (const auto& [tile, own] : strip) {
      std::vector<int32_t> partners;
      for (const int32_t e : own) {
        const Edge& edge = graph.edges[static_cast<size_t>(e)];
        partners.push_back((of_rows ? edge.row : edge.col) % width);
      }
      kinds[partners].push_back(&own);
      edges += own.size();
    }
    const size_t tiles = strip.size();
    for (size_t count = std::max(up(edges, kMaxOutputs), up(tiles, kGradTiles - width)); edges > 0;
         ++count) {
      std::vector<Chunk> cut(count);
      std::vector<size_t> held(count, 0);
      size_t next = 0;
      for (const auto& [partners, own] : kinds) {
        for (const Chunk* edges_of_tile : own) {
          Chunk& chunk = cut[next % count];
          chunk.insert(chunk.end(), edges_of_tile->begin(), edges_of_tile->end());
          ++held[next++ % count];
        }
      }
      bool fits = true;
      for (size_t c = 0; c < count; ++c) {
        fits &= cut[c].size() <= kMaxOutputs && held[c] + static_cast<size_t>(width) <= kGradTiles;
      }
      if (!fits) continue;
      chunks.insert(chunks.end(), cut.begin(), cut.end());
      break;
    }
  }
  return chunks;
}

std::vector<Chunk> best_chunks(const Graph& graph) {
  std::vector<Chunk> best;
  double best_time = 0;
  auto offer = [&](std::vector<Chunk> chunks) {
    const GradLoad load = load_of(graph, chunks);
    double time = 0;
    for (const int steps : kPlannedSteps) {
      const int spans = choose_grad_spans(load, steps, kGroupThreadBlocks);
      time += grad_time_ns(load, steps, spans, kGroupThreadBlocks) / steps;
    }
    if (best.empty() || time < best_time) {
      best = std::move(chunks);
      best_time = time;
    }
  };
  for (int32_t width = 1; width <= 5; ++width) {
    offer(strips(graph, width, true));
    offer(strips(graph, width, false));
  }
  const bool large = graph.edges.size() > 8192;  // the search is then not worth its time
  constexpr int32_t kMost = kMaxOutputs;
  for (int32_t max_edges = kMost; max_edges >= (large ? kMost : 2); --max_edges) {
    for (int32_t max_tiles = std::min(kGradTiles, max_edges + 3);
         max_tiles >= (large ? kGradTiles : 3); --max_tiles) {
      offer(Grower(graph, max_edges, max_tiles).grow());
    }
  }
  return best;
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
  std::vector<GradChunk> chunks;
  const std::vector<Chunk> cut = best_chunks(graph);
  for (const Chunk& members : cut) chunks.push_back(make_chunk(graph, members));
  assign_bias(graph, &chunks);
  const GradLoad load = load_of(graph, cut);
  GradSection section{};
  section.num_outputs = load.outputs;
  section.num_loads = load.loads;
  section.spread_ppm = static_cast<int32_t>(load.spread * 1e6);
  section.step_ps = static_cast<int32_t>(load.step_ns * 1000);
  section.row_tiles = graph.dz_tiles;
  section.col_tiles = graph.x_tiles;
  section.num_chunks = static_cast<int32_t>(chunks.size());
  section.chunks_offset = builder.append(chunks);
  return section;
}

}  // namespace pixelfly
