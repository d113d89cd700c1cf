// Work list of the Hopper weight-gradient kernel: the kept 64x64 tiles of dB, bordered by du (a
// column t) and dv (a row s), cut into chunks of two rows that share tiles of x.
#include <algorithm>
#include <array>
#include <set>
#include <utility>
#include <vector>

#include "planner/plan.h"

namespace pixelfly {
namespace {

constexpr int32_t kTile = 64;

struct Entry {
  int32_t col;
  int32_t output;
};
using Row = std::vector<Entry>;

int32_t tiles(int32_t features) { return (features + kTile - 1) / kTile; }

// Tiles of 64 along a side of `count` blocks; the part of a block past the features has its own.
int32_t side_tiles(const LayoutView& layout, int32_t count) {
  return (count * layout.block_size + kTile - 1) / kTile;
}

// The outputs of every row tile of [dz | s]: kept blocks, and the low-rank border.
std::vector<Row> output_rows(const LayoutView& layout) {
  const int32_t rows = side_tiles(layout, layout.num_rows());
  const int32_t cols = side_tiles(layout, layout.num_cols());
  const int32_t ranks = tiles(layout.rank), sub = layout.block_size / kTile;
  std::vector<Row> out(static_cast<size_t>(rows + ranks));
  std::set<std::pair<int32_t, int32_t>> quads;  // numbered as in row_groups.cpp
  for (int32_t k = 0; k < layout.nnz(); ++k) {
    if (sub == 0) {
      const std::pair<int32_t, int32_t> tile{layout.row_idx[k] / 2, layout.col_idx[k] / 2};
      const auto number = static_cast<int32_t>(quads.size());
      if (quads.insert(tile).second) {
        out[static_cast<size_t>(tile.first)].push_back({tile.second, kGradBlock + number});
      }
      continue;
    }
    for (int32_t r = 0; r < sub; ++r) {
      for (int32_t c = 0; c < sub; ++c) {
        out[static_cast<size_t>(layout.row_idx[k] * sub + r)].push_back(
            {layout.col_idx[k] * sub + c, kGradBlock + (k * sub + r) * sub + c});
      }
    }
  }
  for (int32_t j = 0; j < ranks; ++j) {
    for (int32_t r = 0; r < rows; ++r) {
      out[static_cast<size_t>(r)].push_back({cols + j, kGradDu + r * ranks + j});
    }
    for (int32_t c = 0; c < cols; ++c) {
      out[static_cast<size_t>(rows + j)].push_back({c, kGradDv + c * ranks + j});
    }
  }
  for (Row& row : out) {
    std::sort(row.begin(), row.end(), [](const Entry& a, const Entry& b) { return a.col < b.col; });
  }
  return out;
}

GradChunk empty_chunk(int32_t row0, int32_t row1) {
  GradChunk chunk{};
  chunk.num_rows = row1 >= 0 && row1 != row0 ? 2 : 1;
  chunk.row[0] = row0;
  chunk.row[1] = row1 >= 0 ? row1 : row0;
  return chunk;
}

void add(GradChunk* chunk, int w, const Entry& entry) {
  int32_t slot = 0;
  while (slot < chunk->num_tiles && chunk->tile[slot] != entry.col) ++slot;
  if (slot == chunk->num_tiles) chunk->tile[chunk->num_tiles++] = entry.col;
  chunk->output_tile[w][chunk->num_outputs[w]] = slot;
  chunk->output[w][chunk->num_outputs[w]++] = entry.output;
}

// One row alone: both warpgroups take different columns of it.
void single_row(std::vector<GradChunk>* chunks, int32_t row, const Row& entries) {
  const size_t count = (entries.size() + kGradTiles - 1) / kGradTiles;
  for (size_t c = 0; c < count; ++c) {
    GradChunk chunk = empty_chunk(row, -1);
    int w = 0;
    for (size_t i = c; i < entries.size(); i += count, w ^= 1) add(&chunk, w, entries[i]);
    chunks->push_back(chunk);
  }
}

// Two rows: shared columns and each row's own are dealt evenly over as few chunks as fit.
void row_pair(std::vector<GradChunk>* chunks, int32_t row, const Row& first, const Row& second) {
  std::vector<std::array<Entry, 2>> shared;
  std::array<Row, 2> own;
  auto a = first.begin(), b = second.begin();
  while (a != first.end() || b != second.end()) {
    if (b == second.end() || (a != first.end() && a->col < b->col)) {
      own[0].push_back(*a++);
    } else if (a == first.end() || b->col < a->col) {
      own[1].push_back(*b++);
    } else {
      shared.push_back({*a++, *b++});
    }
  }
  // A much longer row (a global one) sheds its surplus to chunks of its own.
  for (int w = 0; w < 2; ++w) {
    const size_t other = own[1 - w].size();
    if (own[w].size() > other + 2 * kGradOutputs) {
      single_row(chunks, row + w, Row(own[w].begin() + static_cast<long>(other), own[w].end()));
      own[w].resize(other);
    }
  }
  auto up = [](size_t n, size_t d) { return (n + d - 1) / d; };
  size_t count = std::max({up(shared.size() + own[0].size(), kGradOutputs),
                           up(shared.size() + own[1].size(), kGradOutputs),
                           up(shared.size() + own[0].size() + own[1].size(), kGradTiles)});
  auto fits = [&](size_t n) {
    const size_t s = up(shared.size(), n), o0 = up(own[0].size(), n), o1 = up(own[1].size(), n);
    return s + o0 <= kGradOutputs && s + o1 <= kGradOutputs && s + o0 + o1 <= kGradTiles;
  };
  while (count > 0 && !fits(count)) ++count;
  for (size_t c = 0; c < count; ++c) {
    GradChunk chunk = empty_chunk(row, row + 1);
    for (size_t i = c; i < shared.size(); i += count) {
      add(&chunk, 0, shared[i][0]);
      add(&chunk, 1, shared[i][1]);
    }
    // The second row is dealt from the other end, so that chunks load equally many tiles.
    for (size_t i = c; i < own[0].size(); i += count) add(&chunk, 0, own[0][i]);
    for (size_t i = count - 1 - c; i < own[1].size(); i += count) add(&chunk, 1, own[1][i]);
    chunks->push_back(chunk);
  }
}

}  // namespace

GradSection append_grad_chunks(PlanBuilder& builder, const LayoutView& layout) {
  if (layout.block_size < 32) return {};
  const auto rows = output_rows(layout);
  const auto dz_rows = static_cast<size_t>(side_tiles(layout, layout.num_rows()));
  std::vector<GradChunk> chunks;
  for (size_t r = 0; r < dz_rows; r += 2) {
    const auto row = static_cast<int32_t>(r);
    const size_t before = chunks.size();
    if (r + 1 < dz_rows) {
      row_pair(&chunks, row, rows[r], rows[r + 1]);
    } else {
      single_row(&chunks, row, rows[r]);
    }
    // dbias of both rows: the first chunk that has the row, or one of its own if none does.
    for (int32_t w = 0; w < 2 && r + static_cast<size_t>(w) < dz_rows; ++w) {
      bool found = false;
      for (size_t c = before; c < chunks.size() && !found; ++c) {
        for (int g = 0; g < 2 && !found; ++g) {
          found = chunks[c].row[g] == row + w;
          if (found) chunks[c].bias[g] = 1;
        }
      }
      if (!found) {
        chunks.push_back(empty_chunk(row + w, -1));
        chunks.back().bias[0] = 1;
      }
    }
  }
  for (size_t r = dz_rows; r < rows.size(); ++r) {
    single_row(&chunks, static_cast<int32_t>(r), rows[r]);
  }
  GradSection section{};
  section.row_tiles = static_cast<int32_t>(dz_rows);
  section.col_tiles = side_tiles(layout, layout.num_cols());
  section.num_chunks = static_cast<int32_t>(chunks.size());
  section.chunks_offset = builder.append(chunks);
  return section;
}

}  // namespace pixelfly
