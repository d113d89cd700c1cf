// A tensor map that says what it describes, for the emulator.
#pragma once

#include <cstdint>

struct CUtensorMap {
  uint8_t* data;
  int64_t rows, cols, stride_bytes;
  int box_rows, box_cols, element_bytes, swizzle_bytes;
};
