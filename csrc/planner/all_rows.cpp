// Schedule of the product of all output rows at once: which warpgroup of which thread block makes
// which rows.
#include <algorithm>
#include <utility>
#include <vector>

#include "planner/plan.h"
#include "planner/tile_rows.h"

namespace pixelfly {
namespace {

// The warpgroup of each row: 2 part + warpgroup. Rows are exchanged as long as that makes the
// busiest part less busy or, with that, warpgroups more even: in all, and at each tile of x, for
// which they share a ring.
class Dealer {
 public:
  Dealer(const std::vector<Row>& rows, int32_t parts, int32_t x_tiles)
      : warpgroups_(static_cast<size_t>(2 * parts)) {
    for (const Row& row : rows) {
      reads_.emplace_back(static_cast<size_t>(x_tiles), 0);
      for (const Entry& e : row) reads_.back()[static_cast<size_t>(e.x_tile)] = 1;
    }
    // Places, some of them empty where rows are fewer.
    for (size_t place = 0; place < kAllRowsOutputs * warpgroups_; ++place) {
      of_place_.push_back(place < rows.size() ? static_cast<int32_t>(place) : -1);
    }
  }

  std::vector<std::vector<int32_t>> deal() {
    double least = cost();
    for (bool better = true; better;) {
      better = false;
      for (size_t a = 0; a < of_place_.size(); ++a) {
        for (size_t b = a + 1; b < of_place_.size(); ++b) {
          if (warpgroup(a) == warpgroup(b)) continue;
          std::swap(of_place_[a], of_place_[b]);
          const double now = cost();
          if (now < least) {
            least = now;
            better = true;
          } else {
            std::swap(of_place_[a], of_place_[b]);
          }
        }
      }
    }
    std::vector<std::vector<int32_t>> dealt(warpgroups_);
    for (size_t place = 0; place < of_place_.size(); ++place) {
      if (of_place_[place] >= 0) dealt[warpgroup(place)].push_back(of_place_[place]);
    }
    for (auto& some : dealt) std::sort(some.begin(), some.end());
    return dealt;
  }

 private:
  size_t warpgroup(size_t place) const { return place % warpgroups_; }

  double cost() const {
    std::vector<double> all(warpgroups_, 0), at(warpgroups_);
    double uneven = 0;
    for (size_t x = 0; x < reads_[0].size(); ++x) {
      std::fill(at.begin(), at.end(), 0);
      for (size_t place = 0; place < of_place_.size(); ++place) {
        if (of_place_[place] >= 0) {
          at[warpgroup(place)] += reads_[static_cast<size_t>(of_place_[place])][x];
        }
      }
      for (size_t w = 0; w < warpgroups_; w += 2) {
        const double part = at[w] + at[w + 1];
        uneven += at[w] * at[w] + at[w + 1] * at[w + 1] + 2 * part * part;
        all[w] += at[w];
        all[w + 1] += at[w + 1];
      }
    }
    double busiest = 0, squares = 0;
    for (size_t w = 0; w < warpgroups_; w += 2) {
      busiest = std::max(busiest, all[w] + all[w + 1]);
      squares += all[w] * all[w] + all[w + 1] * all[w + 1];
    }
    return 20 * busiest + uneven + squares / static_cast<double>(reads_[0].size());
  }

  size_t warpgroups_;
  std::vector<std::vector<char>> reads_;  // of each row, by tile of x
  std::vector<int32_t> of_place_;
};

}  // namespace

AllRowsSection append_all_rows(PlanBuilder& builder, const LayoutView& layout, bool transposed) {
  const int32_t out_tiles = group_tiles(transposed ? layout.in_features : layout.out_features);
  const int32_t x_tiles = group_tiles(transposed ? layout.out_features : layout.in_features);
  constexpr int32_t kOutputs = 2 * kAllRowsOutputs;  // of a part
  const int32_t most_parts = layout.rank > 0 ? 2 : kMostAllRowsParts;
  const int32_t parts = std::max(2, (out_tiles + kOutputs - 1) / kOutputs);
  if (layout.block_size != 64 && layout.block_size != 128) return {};
  if (parts > most_parts || x_tiles > kMostAllRowsColumns || layout.rank > kGroupTile) return {};
  const std::vector<Row> rows = tile_rows(layout, transposed);
  const bool any_empty =
      std::any_of(rows.begin(), rows.end(), [](const Row& row) { return row.empty(); });
  if (any_empty && layout.rank == 0) return {};

  const auto dealt = Dealer(rows, parts, x_tiles).deal();
  AllRowsSection section{};
  section.parts = parts;
  std::vector<AllRowsPart> records(static_cast<size_t>(parts));
  std::vector<AllRowsColumn> columns(static_cast<size_t>(x_tiles));
  for (int32_t x = 0; x < x_tiles; ++x) columns[static_cast<size_t>(x)].x_tile = x;
  for (size_t w = 0; w < dealt.size(); ++w) {
    AllRowsPart& part = records[w / 2];
    std::vector<std::pair<int32_t, int32_t>> steps;  // x tile, weight; in the order of rows
    for (size_t i = 0; i < kAllRowsOutputs; ++i) {
      const int32_t row = i < dealt[w].size() ? dealt[w][i] : -1;
      part.rows[w % 2][i] = row;
      if (row < 0) continue;
      for (const Entry& e : rows[static_cast<size_t>(row)]) {
        columns[static_cast<size_t>(e.x_tile)].uses |= 1 << (kAllRowsOutputs * w + i);
        steps.emplace_back(e.x_tile, e.weight);
      }
    }
    std::stable_sort(steps.begin(), steps.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
    std::vector<int32_t> weights;
    for (const auto& step : steps) weights.push_back(step.second);
    part.num_rows[w % 2] = static_cast<int32_t>(dealt[w].size());
    part.num_weights[w % 2] = static_cast<int32_t>(weights.size());
    section.num_products += part.num_weights[w % 2];
    for (const int32_t row : dealt[w]) weights.push_back(~row);
    weights.push_back(0);  // whoever reads one ahead may read it
    part.steps_offset[w % 2] = builder.append(weights);
  }
  if (layout.rank == 0) {
    columns.erase(std::remove_if(columns.begin(), columns.end(),
                                 [](const AllRowsColumn& c) { return c.uses == 0; }),
                  columns.end());
  }
  section.num_columns = static_cast<int32_t>(columns.size());
  section.columns_offset = builder.append(columns);
  section.parts_offset = builder.append(records);
  return section;
}

}  // namespace pixelfly
