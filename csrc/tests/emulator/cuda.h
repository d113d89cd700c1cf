// A tensor map that says what it describes, for the emulator.
#pragma once

#include <cstdint>

struct CUtensorMap {
  uint8_t* data;
  int64_t planes, rows, cols, stride_bytes;  // planes lie one behind the other
  int box_rows, box_cols, element_bytes, swizzle_bytes;
};
