// What test_planner.cpp is made of: layouts, their plans, and what is expected of them.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "planner/plan.h"

namespace pixelfly {

inline std::string g_case;
inline int g_failures = 0;

inline void expect(bool ok, const char* what) {
  if (ok) return;
  ++g_failures;
  std::printf("FAILED: %s: %s\n", g_case.c_str(), what);
}

struct Plan {
  explicit Plan(const LayoutView& layout) : words(build_plan(layout)) {
    std::memcpy(&header, words.data(), sizeof(header));
  }
  template <typename T>
  const T* at(int32_t offset) const {
    return reinterpret_cast<const T*>(words.data() + offset);
  }
  std::vector<int32_t> words;
  PlanHeader header;
};

inline int32_t tiles(int32_t features) { return (features + 63) / 64; }

inline LayoutView make(int32_t rows, int32_t cols, int32_t b, int32_t rank, int32_t tail,
                       const std::function<bool(int32_t, int32_t)>& keep) {
  LayoutView layout{rows * b - tail, cols * b - tail, b, rank, {}, {}};
  for (int32_t i = 0; i < rows; ++i) {
    for (int32_t j = 0; j < cols; ++j) {
      if (!keep(i, j)) continue;
      layout.row_idx.push_back(i);
      layout.col_idx.push_back(j);
    }
  }
  return layout;
}

inline bool butterfly(int32_t i, int32_t j) {
  const int32_t d = i ^ j;
  return (d & (d - 1)) == 0;
}
// A layer four times as wide as its input, and a butterfly with a dense row and column.
inline bool wide(int32_t i, int32_t j) { return butterfly(i / 4, j); }
inline bool global(int32_t i, int32_t j) { return i == 0 || j == 0 || butterfly(i, j); }

}  // namespace pixelfly
