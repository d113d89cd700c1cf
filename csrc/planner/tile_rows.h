// A layout's output rows as lists of 64x64 weight tiles.
#pragma once

#include <vector>

#include "planner/pair_rows.h"
#include "planner/plan.h"

namespace pixelfly {

// Blocks of 32: tiles of two by two blocks, numbered as they are appended to `quads`.
std::vector<Row> quad_rows(const LayoutView& layout, bool transposed,
                           std::vector<GroupQuad>& quads);

// Blocks of 64 or 128: each is one or four tiles, numbered as in GroupStep.
std::vector<Row> tile_rows(const LayoutView& layout, bool transposed);

}  // namespace pixelfly
