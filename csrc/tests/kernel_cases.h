// Calls of whole layers on the emulator: the named and random ones of test_kernels.cpp, and what
// test_thirds.cpp shares with it.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "kernel_case.h"
#include "planner/plan.h"

namespace pixelfly {

inline bool butterfly(int i, int j) { return ((i ^ j) & ((i ^ j) - 1)) == 0; }
inline bool global(int i, int j) { return i == 0 || j == 0 || butterfly(i, j); }
inline bool everything(int, int) { return true; }
inline bool holes(int i, int j) { return i % 3 != 1 && (i + j) % 2 == 0; }
inline bool checkered(int i, int j) { return (i + j) % 2 == 0; }
inline bool nothing(int, int) { return false; }
inline bool one_dense(int i, int j) { return i == 0 || j == 3 * i; }
inline bool lines(int i, int) { return i < 2 || i == 4; }
inline bool edges(int i, int) { return i < 2 || i > 5; }
// Rows that share little: alone, with weights in registers.
inline bool bands(int i, int j) { return (j + 9 * i) % 36 < 13; }
inline bool bands_down(int i, int j) { return bands(j, i); }

inline std::vector<Case> cases() {
  constexpr auto kGelu = Activation::kGelu;
  constexpr auto kTanh = Activation::kGeluTanh;
  constexpr auto kRelu = Activation::kRelu;
  constexpr auto kSilu = Activation::kSilu;
  constexpr auto kNone = Activation::kNone;
  std::vector<Case> all = {
      {"butterfly b64", 4, 4, 64, 0, 0, butterfly, 300, 0},
      {"butterfly b64 rank 16 gelu", 4, 4, 64, 8, 24, butterfly, 300, 16, kGelu, false, true},
      {"global b64 many units", 6, 4, 64, 0, 0, global, 700, 64, kRelu, true, true, 90, 2},
      {"dense rows b64 streamed", 2, 14, 64, 0, 0, everything, 200, 8, kTanh, true},
      {"streamed b64", 4, 23, 64, 8, 16, everything, 620, 0, kNone, false, false, 90, 2},
      {"both rows use all b64", 4, 16, 64, 0, 0, everything, 300, 0, kGelu, false, true, 90, 2},
      {"streamed gelu b64", 3, 22, 64, 0, 0, everything, 300, 72, kGelu, false, true, 90, 1},
      {"streamed or empty b64", 5, 24, 64, 0, 0, lines, 330, 0, kRelu, false, false, 90, 1},
      {"holes b64", 5, 3, 64, 56, 8, holes, 129, 24, kSilu, true, true},
      {"empty groups between b64", 8, 3, 64, 0, 0, edges, 300, 0, kNone, false, false, 90, 1},
      {"one dense row b64", 6, 22, 64, 0, 0, one_dense, 280, 8, kGelu, false, true, 90, 1},
      {"one dense row b32", 6, 44, 32, 0, 0, one_dense, 280, 0, kRelu, true, false, 90, 1},
      {"nothing kept b64", 3, 2, 64, 0, 0, nothing, 70, 8},
      {"butterfly b128", 3, 2, 128, 40, 0, butterfly, 260, 8, kGelu, true, true},
      {"wide b128", 1, 3, 128, 0, 88, everything, 64, 0},
      {"butterfly b32", 5, 7, 32, 24, 8, butterfly, 150, 40, kRelu, true},
      {"rank 136 b64", 3, 4, 64, 16, 0, butterfly, 200, 136},
      {"rank 72 b128", 2, 1, 128, 8, 24, everything, 150, 72, kRelu, false, true},
      {"holes b32", 6, 4, 32, 0, 0, holes, 300, 0, kGelu, false, true},
      {"one token b64", 2, 2, 64, 0, 0, everything, 1, 8},
      {"rows alone b64", 4, 36, 64, 8, 16, bands, 300, 0, kGelu, false, true, 90, 1},
      {"rows alone rank 8 b64", 4, 36, 64, 0, 8, bands, 390, 8, kRelu, true, false, 90, 3},
      {"rows alone rank 72 b64", 4, 36, 64, 0, 0, bands, 130, 72, kNone, false, false, 90, 2},
      {"rows alone dx b64", 36, 4, 64, 16, 8, bands_down, 300, 0, kSilu, false, true, 90, 2},
      {"rows alone dx rank 8 b64", 36, 4, 64, 0, 0, bands_down, 390, 8, kNone, true, false, 90, 1},
      // Two thread blocks of the thin product on a multiprocessor: rings of six stages.
      {"two t a multiprocessor b64", 2, 20, 64, 0, 40, one_dense, 130, 72, kRelu, false, false, 90,
       4},
      // More than three: thread blocks of 128 tokens, with rings of four and of three stages.
      {"two t of 128 tokens b64", 2, 20, 64, 0, 40, one_dense, 300, 72, kRelu, false, false, 90, 3},
      {"more t of 128 tokens b64", 8, 9, 64, 8, 40, butterfly, 300, 72, kGelu, false, false, 90, 2},
  };
  // Thin products that clusters share; two tiles of ranks are never formed beside the product.
  const std::pair<Case, int> clusters[] = {
      {{"t by clusters of 8 b64", 3, 33, 64, 8, 16, one_dense, 130, 72, kGelu, false, true, 90,
        132},
       8},
      {{"t by clusters of 4 b64", 2, 18, 64, 0, 40, one_dense, 60, 72, kRelu, false, false, 90, 8},
       4},
      {{"s by clusters of 4 b64", 18, 3, 64, 56, 0, lines, 70, 8, kRelu, false, false, 90, 16}, 4},
      {{"t by clusters of 2 b32", 5, 32, 32, 0, 24, butterfly, 100, 72, kSilu, true, false, 90, 8},
       2},
      // Rings of eight stages that go round more than twice.
      {{"long t by clusters of 2 b64", 2, 40, 64, 0, 40, one_dense, 60, 72, kRelu, false, true, 90,
        5},
       2},
  };
  for (const auto& [c, cluster] : clusters) {
    all.push_back(c);
    all.back().cluster = cluster;
  }
  // t and s beside the product, from so few tiles of x that the factor stays in shared memory, and
  // from more; by two thread blocks, or by one, in proportion to three multiprocessors.
  const Case ahead[] = {
      {"t beside b64", 3, 20, 64, 8, 40, one_dense, 650, 64, kNone, false, false, 90, 132},
      {"t beside, residual and slopes b64", 4, 16, 64, 8, 40, butterfly, 390, 64, kGelu, true, true,
       90, 132},
      {"t beside rank 24 b32", 9, 5, 32, 8, 24, butterfly, 300, 24, kSilu, false, true, 90, 132},
      {"s beside b64", 18, 4, 64, 8, 8, lines, 520, 8, kRelu, false, true, 90, 132},
      {"s beside by one b64", 11, 1, 64, 8, 0, lines, 300, 64, kRelu, false, true, 90, 3},
  };
  for (const Case& c : ahead) {
    all.push_back(c);
    all.back().ahead = 2;
  }
  const Case few[] = {
      {"few b64", 8, 8, 64, 8, 24, butterfly, 390, 0, kGelu, true, true},
      {"few b64 rank 8", 16, 15, 64, 56, 0, butterfly, 257, 8, kRelu, false, true},
      {"few b32", 16, 16, 32, 24, 8, butterfly, 300, 0, kSilu, false, false, 90, 132},
  };
  for (const Case& c : few) {
    all.push_back(c);
    all.back().few = true;
  }
  // product_split_sm90 by every tile; with clusters for long rows alone by some, where the others
  // do not fill the last cluster, or there are none.
  const std::pair<Case, bool> split[] = {
      {{"split butterfly b64", 4, 5, 64, 8, 24, butterfly, 190, 16, kGelu, false, true}, false},
      {{"split one dense row b64", 3, 14, 64, 0, 0, one_dense, 70, 72, kRelu, true, true}, false},
      {{"split b128", 1, 4, 128, 40, 88, everything, 70, 72, kSilu, true, false}, false},
      {{"split long b64", 6, 11, 64, 8, 0, one_dense, 190, 8, kGelu, true, true}, true},
      {{"split long dx b64", 7, 6, 64, 0, 24, lines, 70, 0, kSilu, false, true}, true},
      {{"split long b128", 3, 4, 128, 72, 8, one_dense, 130, 72, kRelu, true, false}, true},
  };
  for (auto [c, long_only] : split) {
    const std::string name = c.name;
    c.sms = 1;  // t without clusters
    c.path = "split";
    c.long_only = long_only;
    for (c.warpgroups = 1; c.warpgroups <= 2; ++c.warpgroups) {
      for (c.cluster = long_only ? 2 : 1; c.cluster <= 8; c.cluster *= long_only ? 4 : 2) {
        c.name = name + " tile " + std::to_string(c.warpgroups) + " " + std::to_string(c.cluster);
        all.push_back(c);
      }
    }
  }
  const std::pair<Case, int> split_by_launcher[] = {
      {{"split empty b64", 3, 2, 64, 0, 0, nothing, 70, 0, kRelu, false, false, 90, 7, "split"}, 1},
      {{"split one token b64", 2, 9, 64, 0, 0, holes, 1, 8, kGelu, false, true, 90, 3, "split"}, 1},
      {{"split ranks b64", 2, 3, 64, 56, 56, nothing, 200, 136, kTanh, true, true, 90, 2, "split"},
       1},
      {{"split many tokens b128", 1, 3, 128, 64, 0, everything, 700, 0, kNone, true, false, 90, 2,
        "split"},
       1},
  };
  for (const auto& [c, cluster] : split_by_launcher) {
    all.push_back(c);
    all.back().cluster = cluster;
  }
  // All output rows at once, by one set of thread blocks or several, over one token tile or more,
  // the last of them cut in two; with low rank in clusters of two.
  const Case all_rows[] = {
      {"all rows b64", 8, 9, 64, 8, 40, butterfly, 300, 0, kNone, false, false, 90, 5, "all_rows"},
      {"all rows in three parts b64", 16, 5, 64, 0, 8, global, 390, 0, kNone, false, false, 90, 3,
       "all_rows"},
      {"all rows b128", 4, 5, 128, 72, 8, global, 260, 0, kNone, false, false, 90, 2, "all_rows"},
      {"all rows rank 64 b64", 11, 12, 64, 56, 0, global, 850, 64, kNone, false, false, 90, 5,
       "all_rows"},
      {"all rows rank 24 b64", 5, 7, 64, 0, 24, lines, 270, 24, kNone, false, false, 90, 4,
       "all_rows"},
      {"all rows rank 40 b128", 3, 2, 128, 40, 8, butterfly, 129, 40, kNone, false, false, 90, 2,
       "all_rows"},
      {"all rows one token b64", 2, 3, 64, 0, 0, nothing, 1, 8, kNone, false, false, 90, 2,
       "all_rows"},
  };
  for (const Case& c : all_rows) {
    all.push_back(c);
    if (c.rank > 0) all.back().cluster = 2;
  }
  for (const int thread_blocks : {1, 2, 7}) {  // fewer and more than there are multiprocessors
    all.push_back({"plan for " + std::to_string(thread_blocks) + " thread blocks", 6, 4, 64, 8, 0,
                   global, 400, 16, kGelu, false, true, 90, 3});
    all.back().thread_blocks = thread_blocks;
  }
  // Slopes in codes: ragged features and tokens, one staging tile, cooperative warpgroups both
  // ways, NaN.
  const std::vector<Case> slopes = {
      {"slopes ragged b64", 6, 8, 64, 56, 56, butterfly, 257, 8, kGelu, false, true},
      {"slopes ragged residual b64", 6, 8, 64, 56, 56, butterfly, 129, 0, kRelu, true, true},
      {"slopes one staging tile b64", 3, 17, 64, 8, 8, everything, 300, 0, kTanh, false, true, 90,
       2},
      {"slopes cooperative dx b64", 23, 3, 64, 8, 16, everything, 620, 0, kSilu, false, true, 90,
       2},
      {"slopes cooperative y b64", 3, 23, 64, 40, 0, everything, 390, 0, kGelu, false, true, 90, 1},
      {"slopes cooperative dx b32", 22, 4, 32, 8, 16, everything, 390, 0, kSilu, false, true, 90,
       2},
      {"slopes cooperative y b32", 4, 22, 32, 8, 16, everything, 390, 8, kGelu, false, true, 90, 1},
      {"slopes ragged b32", 7, 5, 32, 24, 8, holes, 200, 40, kGelu, false, true},
      {"slopes ragged b128", 2, 3, 128, 56, 56, butterfly, 150, 0, kSilu, false, true},
      {"slopes portable b64", 3, 3, 64, 56, 40, butterfly, 140, 8, kGelu, true, true, 80, 2,
       "sm80"},
      {"slopes split b64", 3, 4, 64, 56, 40, butterfly, 150, 8, kGelu, true, true, 90, 2, "split"},
      {"slopes few b64", 3, 3, 64, 56, 40, butterfly, 50, 8, kGelu, true, true, 80, 2, "few"},
  };
  for (Case c : slopes) {
    all.push_back(c);
    c.name += " nan";
    c.nan = true;
    all.push_back(c);
  }
  // Two groups of features in a thread block, one, and thread blocks of fewer tokens.
  for (const int sms : {2, 20, 40}) {
    for (const int tokens : {1, 9, 30, 64, 150}) {
      Case c{"few tokens " + std::to_string(tokens) + " sms" + std::to_string(sms),
             4,
             3,
             tokens == 9 ? 32 : 64,
             8,
             16,
             tokens == 30 ? holes : butterfly,
             tokens,
             tokens == 1 ? 0 : 40,
             tokens == 64 ? kGelu : kRelu,
             tokens != 1,
             tokens == 64,
             80,
             sms,
             "few"};
      all.push_back(c);
    }
  }
  for (const int b : {16, 32, 64, 128}) {
    Case c{"portable b" + std::to_string(b),
           3,
           2,
           b,
           8,
           8,
           butterfly,
           140,
           b == 32 ? 0 : 24,
           b == 64 ? kGelu : kSilu,
           b != 16,
           b != 32,
           80,
           2,
           "sm80"};
    all.push_back(c);
  }
  return all;
}

// A random call; its name tells how to build it again.
inline Case random_case(uint64_t seed) {
  std::mt19937_64 rng(seed);
  auto pick = [&](int low, int high) {
    return low + static_cast<int>(rng() % static_cast<uint64_t>(high - low + 1));
  };
  Case c{};
  c.block = 32 << pick(0, 2);
  const int most = 640 / c.block;
  c.rows = pick(1, most);
  c.cols = pick(1, pick(0, 3) == 0 ? 3 * most : most);
  c.row_tail = 8 * pick(0, c.block / 8 - 1) * (pick(0, 1));
  c.col_tail = 8 * pick(0, c.block / 8 - 1) * (pick(0, 1));
  const int density = pick(0, 9), dense_row = pick(0, 3) == 0 ? pick(0, c.rows - 1) : -1;
  const uint64_t salt = rng();
  c.keep = [=](int i, int j) {
    if (i == dense_row) return true;
    std::mt19937_64 cell(salt ^ (static_cast<uint64_t>(i) << 32 | static_cast<uint64_t>(j)));
    return static_cast<int>(cell() % 10) < density;
  };
  c.tokens = pick(1, pick(0, 4) == 0 ? 900 : 300);
  c.rank = pick(0, 2) == 0 ? 0 : 8 * pick(1, 18);
  c.activation = static_cast<Activation>(pick(0, 4));
  c.residual = pick(0, 1) == 1;
  c.save_slope = pick(0, 1) == 1;
  c.sms = pick(1, 6);
  if (pick(0, 3) == 0) {  // the portable kernels, and those for few tokens
    c.arch = 80;
    c.path = "auto";
    if (pick(0, 1) == 0) c.tokens = pick(1, 64);
  }
  if (pick(0, 1) == 0) c.thread_blocks = pick(1, 8);
  if (c.arch == 90 && c.block >= 64 && pick(0, 2) == 0) {
    c.path = "split";
    c.warpgroups = pick(0, 2);
    c.cluster = 1 << pick(0, 3);
    c.long_only = pick(0, 1) == 1;
    if (pick(0, 1) == 0) c.sms = pick(7, 132);
  }
  c.name = "fuzz " + std::to_string(seed) + " b" + std::to_string(c.block);
  return c;
}

inline LayoutView layout_of(const Case& c) {
  LayoutView layout{c.n(), c.k(), c.block, c.rank, {}, {}, c.thread_blocks};
  for (int i = 0; i < c.rows; ++i) {
    for (int j = 0; j < c.cols; ++j) {
      if (!c.keep(i, j)) continue;
      layout.row_idx.push_back(i);
      layout.col_idx.push_back(j);
    }
  }
  return layout;
}

// When copies and products complete.
struct Mood {
  const char* name;
  emulator::Eagerness eagerness;
  uint64_t seed;
};
constexpr Mood kMoods[] = {{"late", emulator::Eagerness::kLate, 1},
                           {"early", emulator::Eagerness::kEarly, 2},
                           {"random", emulator::Eagerness::kRandom, 3}};

// Whether a name contains every word of the command line.
inline bool wanted(const std::string& name, int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (name.find(argv[i]) == std::string::npos) return false;
  }
  return true;
}

}  // namespace pixelfly
