// Which rows of output tiles share a thread block.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace pixelfly {

// A nonzero 64x64 tile of an output row.
struct Entry {
  int32_t x_tile;
  int32_t weight;
};
using Row = std::vector<Entry>;                          // in ascending order of x_tile
using Pairs = std::vector<std::pair<int32_t, int32_t>>;  // of rows; second -1: a row alone

// Every row with a partner, if one is left.
Pairs pair_rows(const std::vector<Row>& rows, int32_t x_tiles);

// The pairs without those whose rows are expected to be quicker alone, and how long all take then
// and before, in products of a weight tile.
struct Parted {
  Pairs pairs;
  double time;
  double time_of_pairs;
};
Parted part_pairs(const std::vector<Row>& rows, const Pairs& pairs, int32_t rank_tiles);

}  // namespace pixelfly
