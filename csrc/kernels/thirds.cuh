// Where a tile of an operand lies that may be three matrices side by side (OtherThirds).
#pragma once

namespace pixelfly {

struct TilePlace {
  int matrix;
  int tile;  // of that matrix
};

// Tile `tile` of matrices of `each` tiles; one matrix has all of them.
__device__ __forceinline__ TilePlace place_of_tile(int tile, int each) {
  const int matrix = (tile >= each) + (tile >= 2 * each);
  return {matrix, tile - matrix * each};
}

}  // namespace pixelfly
