// TMA on the emulator. Loads land and stores are read at a moment of the machine's choice.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>

namespace pixelfly::device {

// Calls f(address of 16 bytes in shared memory, address in global memory, how many of the 16 bytes
// are inside) for a box of one plane.
template <typename F>
void for_box(const CUtensorMap& map, uint32_t shared, int col, int row, int plane, F f) {
  const int row_bytes = map.box_cols * map.element_bytes;
  for (int r = 0; r < map.box_rows; ++r) {
    for (int b = 0; b < row_bytes; b += 16) {
      const int64_t at_row = int64_t{row} + r, at_col = int64_t{col} + b / map.element_bytes;
      const bool inside = at_row >= 0 && at_row < map.rows && at_col >= 0 && at_col < map.cols &&
                          plane >= 0 && plane < map.planes;
      const int64_t left = (map.cols - at_col) * map.element_bytes;
      const size_t bytes = inside ? static_cast<size_t>(std::min<int64_t>(left, 16)) : 0;
      uint8_t* global = inside ? map.data + (plane * map.rows + at_row) * map.stride_bytes +
                                     at_col * map.element_bytes
                               : nullptr;
      const uint32_t linear = shared + static_cast<uint32_t>(r * row_bytes + b);
      f(emulator::swizzle(linear, map.swizzle_bytes), global, bytes);
    }
  }
}
inline uint32_t box_bytes(const CUtensorMap& map) {
  return static_cast<uint32_t>(map.box_rows * map.box_cols * map.element_bytes);
}

inline void tma_load_3d(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int col, int row,
                        int plane) {
  const CUtensorMap box = *map;
  if (shared % 128 != 0) emulator::fail("a TMA load's target is not aligned to 128 bytes");
  std::memset(emulator::shared_bytes(shared, box_bytes(box)), 0xff, box_bytes(box));
  emulator::post([=] {
    for_box(box, shared, col, row, plane, [](uint32_t to, const uint8_t* from, size_t inside) {
      uint8_t* bytes = emulator::shared_bytes(to, 16);
      std::memset(bytes, 0, 16);
      if (inside > 0) std::memcpy(bytes, from, inside);
    });
    emulator::barrier_complete(barrier, box_bytes(box));
  });
}
inline void tma_load_2d(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int col,
                        int row) {
  tma_load_3d(shared, map, barrier, col, row, 0);
}
inline void tma_store_3d(const CUtensorMap* map, uint32_t shared, int col, int row, int plane) {
  const CUtensorMap box = *map;
  emulator::check_fenced(shared, box_bytes(box), "a TMA store");
  emulator::bulk_stores().issue([=] {
    for_box(box, shared, col, row, plane, [](uint32_t from, uint8_t* to, size_t inside) {
      if (inside > 0) std::memcpy(to, emulator::shared_view(from, 16), inside);
    });
  });
}
inline void tma_store_2d(const CUtensorMap* map, uint32_t shared, int col, int row) {
  tma_store_3d(map, shared, col, row, 0);
}
inline void tma_store_commit() {
  emulator::bulk_stores().commit();
  emulator::maybe_advance(emulator::bulk_stores());
}
template <int kPending>
void tma_store_wait_read() {
  emulator::bulk_stores().wait(kPending);
}
template <int kPending>
void tma_store_wait() {
  emulator::bulk_stores().wait(kPending);
}

}  // namespace pixelfly::device
