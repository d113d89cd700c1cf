// Cuts of the weight gradients' outputs into chunks. A thread block loads every tile that its
// outputs touch, so a chunk should have many edges between few tiles. Chunks differ little from
// each other, or else they drift apart and L2 no longer serves what they share.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <numeric>
#include <set>
#include <utility>
#include <vector>

#include "pixelfly/grad_spans.h"
#include "pixelfly/schedule.h"
#include "planner/grad_border.h"
#include "planner/grad_graph.h"

namespace pixelfly::grad {
namespace {

constexpr int kManySteps[] = {256, 512, 1024};  // 8192, 16384 and 32768 tokens
constexpr int kFewSteps[] = {16, 32, 64, 128};  // 512 to 4096 tokens
constexpr int32_t kGrownTiles = 160;

size_t up(size_t n, size_t d) { return (n + d - 1) / d; }

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

}  // namespace

GradLoad load_of(const Graph& graph, const std::vector<Chunk>& chunks) {
  GradLoad load{};
  load.chunks = static_cast<int32_t>(chunks.size());
  load.outputs = static_cast<int32_t>(graph.edges.size());
  load.tiles = graph.vertices();
  double outputs_squared = 0;
  std::vector<int32_t> times(static_cast<size_t>(graph.vertices()), 0);  // a tile is loaded
  for (const Chunk& chunk : chunks) {
    const std::vector<int32_t> distinct = tiles_of(graph, chunk);
    for (const int32_t v : distinct) ++times[static_cast<size_t>(v)];
    const auto tiles = static_cast<int32_t>(distinct.size());
    const double outputs = static_cast<double>(chunk.size());
    load.loads += tiles;
    load.most_tiles = std::max(load.most_tiles, tiles);
    load.most_outputs = std::max(load.most_outputs, static_cast<int32_t>(chunk.size()));
    load.step_ns = std::max(load.step_ns, grad_step_ns(tiles, outputs));
    outputs_squared += outputs * outputs;
  }
  if (chunks.empty()) return load;
  const auto count = static_cast<double>(chunks.size()), sum = static_cast<double>(load.outputs);
  const double variation = std::sqrt(std::max(0., count * outputs_squared / (sum * sum) - 1));
  const auto own = static_cast<double>(std::count(times.begin(), times.end(), 1));
  load.spread = grad_spread(variation, own / count);
  return load;
}

namespace {

// Cuts `edges` into strips of `width` tiles of one side, each evenly: a strip's tiles of the other
// side are dealt over as few chunks of at most `most_tiles` tiles and `most_outputs` edges as hold
// them, those with the same partners in turn. `place` numbers the tiles of that one side. One tile
// must fit: `width` is less than `most_tiles` and at most `most_outputs`.
std::vector<Chunk> strips(const Graph& graph, const std::vector<int32_t>& edges,
                          const std::vector<int32_t>& place, int32_t width, bool of_rows,
                          size_t most_tiles = kGradTiles, size_t most_outputs = kMaxOutputs) {
  std::vector<std::map<int32_t, Chunk>> members;  // of a strip: edges by tile of the other side
  auto place_of = [&](const Edge& edge) {
    return place[static_cast<size_t>(of_rows ? edge.row : edge.col)];
  };
  for (const int32_t e : edges) {
    const Edge& edge = graph.edges[static_cast<size_t>(e)];
    const auto strip = static_cast<size_t>(place_of(edge) / width);
    if (strip >= members.size()) members.resize(strip + 1);
    members[strip][of_rows ? edge.col : edge.row].push_back(e);
  }
  std::vector<Chunk> chunks;
  for (const auto& strip : members) {
    // Tiles with the same partners, by the partners' places in the strip.
    std::map<std::vector<int32_t>, std::vector<const Chunk*>> kinds;
    size_t edges = 0;
    for (const auto& [tile, own] : strip) {
      std::vector<int32_t> partners;
      for (const int32_t e : own) {
        partners.push_back(place_of(graph.edges[static_cast<size_t>(e)]) % width);
      }
      kinds[partners].push_back(&own);
      edges += own.size();
    }
    const size_t tiles = strip.size();
    for (size_t count =
             std::max(up(edges, most_outputs), up(tiles, most_tiles - static_cast<size_t>(width)));
         edges > 0; ++count) {
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
        fits &= cut[c].size() <= most_outputs && held[c] + static_cast<size_t>(width) <= most_tiles;
      }
      if (!fits) continue;
      chunks.insert(chunks.end(), cut.begin(), cut.end());
      break;
    }
  }
  return chunks;
}

// The best of the cuts it is offered, for some numbers of steps.
class Best {
 public:
  Best(const int* begin, const int* end, int thread_blocks)
      : steps_(begin, end), thread_blocks_(thread_blocks) {}
  void offer(const std::vector<Chunk>& chunks, const GradLoad& load) {
    double time = 0;
    for (const int steps : steps_) {
      const int spans = choose_grad_spans(load, steps, thread_blocks_);
      time += grad_time_ns(load, steps, spans, thread_blocks_) / steps;
    }
    if (chunks_.empty() || time < time_) {
      chunks_ = chunks;
      time_ = time;
    }
  }
  std::vector<Chunk> take() { return std::move(chunks_); }

 private:
  std::vector<int> steps_;
  int thread_blocks_;
  std::vector<Chunk> chunks_;
  double time_ = 0;
};

}  // namespace

Cuts best_cuts(const Graph& graph, int thread_blocks) {
  Best many(std::begin(kManySteps), std::end(kManySteps), thread_blocks);
  Best few(std::begin(kFewSteps), std::end(kFewSteps), thread_blocks);
  auto offer = [&](const std::vector<Chunk>& chunks) {
    const GradLoad load = load_of(graph, chunks);
    many.offer(chunks, load);
    few.offer(chunks, load);
  };
  std::vector<int32_t> numbers(static_cast<size_t>(graph.vertices()));
  std::iota(numbers.begin(), numbers.end(), 0);
  const Border rows = border_of(graph, true), cols = border_of(graph, false), none;
  for (const auto& [own_rows, own_cols] :
       {std::pair(false, false), {true, false}, {false, true}, {true, true}}) {
    if ((own_rows && rows.tiles == 0) || (own_cols && cols.tiles == 0)) continue;
    const Parts parts = part(graph, own_rows ? rows : none, own_cols ? cols : none);
    auto cores = [&](size_t most_outputs) {
      std::vector<std::vector<Chunk>> cuts;
      const auto widest = std::min<int32_t>(5, static_cast<int32_t>(most_outputs));
      for (int32_t width = 1; width <= widest; ++width) {
        for (const bool of_rows : {true, false}) {
          cuts.push_back(
              strips(graph, parts.core, numbers, width, of_rows, kGradTiles, most_outputs));
        }
      }
      return cuts;
    };
    // Chunks of the border's own, of some of its edges.
    auto apart = [&](const std::vector<int32_t>& row_edges, const std::vector<int32_t>& col_edges,
                     size_t most_tiles, size_t most_outputs) {
      constexpr int32_t kWidest = 2;
      auto chunks = strips(graph, row_edges, rows.place, std::min(rows.tiles, kWidest), true,
                           most_tiles, most_outputs);
      const auto col_chunks = strips(graph, col_edges, cols.place, std::min(cols.tiles, kWidest),
                                     false, most_tiles, most_outputs);
      chunks.insert(chunks.end(), col_chunks.begin(), col_chunks.end());
      return chunks;
    };
    auto offer_with_border = [&](const std::vector<std::vector<Chunk>>& cuts, size_t most_tiles,
                                 size_t most_outputs) {
      const auto border = apart(parts.rows, parts.cols, most_tiles, most_outputs);
      for (std::vector<Chunk> chunks : cuts) {
        chunks.insert(chunks.end(), border.begin(), border.end());
        offer(chunks);
      }
      return !border.empty();
    };
    // The border's edges beside those that share a tile with them; what has no room apart.
    auto offer_dealt = [&](std::vector<Chunk> chunks, size_t most_outputs) {
      const auto col_left = deal(graph, parts.cols, false, most_outputs, &chunks);
      const auto row_left = deal(graph, parts.rows, true, most_outputs, &chunks);
      const auto border = apart(row_left, col_left, kGradTiles, most_outputs);
      chunks.insert(chunks.end(), border.begin(), border.end());
      offer(chunks);
    };
    // Smaller chunks than the largest, as long as no multiprocessor has more than two to do.
    for (size_t most = kMaxOutputs; most >= 2; --most) {
      if (most < kMaxOutputs &&
          graph.edges.size() > 2 * static_cast<size_t>(thread_blocks) * most) {
        break;
      }
      const auto cut = cores(most);
      if (!parts.rows.empty() || !parts.cols.empty()) {
        for (const std::vector<Chunk>& chunks : cut) offer_dealt(chunks, most);
      }
      // The border's chunks in all sizes: those larger than the others make every step longer. More
      // than two tiles beside one for each output are never loaded.
      size_t tiles = std::min<size_t>(kGradTiles, most + 2);
      while (offer_with_border(cut, tiles, most) && tiles > kGradTiles / 2) --tiles;
    }
  }
  // Grown chunks share tiles on both sides, and on large layouts drift too far apart: they took up
  // to 1.9 times as long as strips there.
  if (graph.vertices() <= kGrownTiles) {
    for (int32_t max_edges = kMaxOutputs; max_edges >= 2; --max_edges) {
      for (int32_t max_tiles = std::min(kGradTiles, max_edges + 3); max_tiles >= 3; --max_tiles) {
        offer(Grower(graph, max_edges, max_tiles).grow());
      }
    }
  }
  return {many.take(), few.take()};
}

}  // namespace pixelfly::grad
