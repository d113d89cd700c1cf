// The plan: everything a kernel needs to know about a block layout, as one int32 array.
//
// The planner (host C++) writes it once per (layout, rank); a copy lives on the device and is an
// ordinary tensor argument of the operators; the first kPlanHeaderSize integers also travel on the
// host, as decimal text, so that launchers can choose grids and kernels without a device read.
// All `*_offset` fields count int32 elements from the start of the array.
//
// Low rank is a border of the sparse matrix: with rank r and block size b, `rank_tiles = ceil(r /
// b)` extra block columns (the tensor t = x vᵀ) follow the real ones, and in the transposed product
// the same number of extra block columns (the tensor s = dy u) follow the block rows. A column
// index
// `>= num_cols` in a step therefore means "tile (index - num_cols) of t", and a block id `>= nnz`
// means "the low-rank factor's tile for this output row".
#pragma once

#include <cstdint>

namespace pixelfly {

constexpr int32_t kPlanMagic = 0x70666c79;  // "pfly"
// Goes up with every change of the plan or of the operators' schemas: torch keeps compiled programs
// on disk, and the header, which has this number, is all that tells those of another build.
constexpr int32_t kPlanVersion = 21;
constexpr int kPlanHeaderSize = 245;

// Multiprocessors that plans are made for unless the caller names another number: those of an H100
// (SXM) and H200.
constexpr int32_t kUsualThreadBlocks = 132;

// Schedule of the row-group product (kernels/product_sm90.cuh). Everything is in units of 64x64
// tiles, whatever the block size (32, 64 or 128): output tiles, x tiles (tile >= num_x_tiles: tile
// of t) and weight tiles. With 32x32 blocks a weight tile is four blocks, absent ones being zero.
constexpr int kGroupTile = 64;
inline int32_t group_tiles(int32_t features) { return (features + kGroupTile - 1) / kGroupTile; }

// One step of a row group: a tile of x columns and the weight tiles that multiply it.
struct GroupStep {
  int32_t x_tile;     // >= num_x_tiles: tile (x_tile - num_x_tiles) of t, weights from the factor
  int32_t weight[2];  // weight tile for rows[0] and rows[1]; -1: that row does not use this x tile.
                      // Tile w of the blocks starts at row (w >> s) * 64, column (w % 2^s) * 64 of
                      // the [nnz * b, b] matrix, 2^s = b / 64; for b = 32, w counts GroupQuads.
                      // Tiles of the factor follow from (row, x_tile); the value is then >= 0.
  int32_t slot;       // weight tiles in the group's earlier steps: where one that stays lies
};

// Two output tiles computed together so that they share tiles of x.
struct RowGroup {
  int32_t rows[2];     // output tiles; rows[1] == -1: a single row
  int32_t step_begin;  // into the section's steps
  int32_t step_end;
};

// A 64x64 weight tile made of 32x32 blocks: block[2 * x half + output half], -1: zero. In the
// transposed section x are the block rows; the weight gradients read the forward section's quads.
struct GroupQuad {
  int32_t block[4];
};

// Instead of a number of weight tiles: they come with every token tile.
constexpr int32_t kGroupStreams = 1 << 20;

// What one thread block does at a stretch: of the token tiles from `begin / parts` to `end / parts`
// of all of them, those numbered lane, lane + lanes, ..., for one group.
struct GroupUnit {
  int32_t group;
  int32_t lane;
  int32_t lanes;
  int32_t weights;  // weight tiles that stay in shared memory, or kGroupStreams
  int32_t begin;
  int32_t end;  // == begin: nothing to do
  int32_t parts;
  int32_t stages;  // of x, at most (planner/group_units.cpp)
};

// Shared memory of a Hopper thread block in tiles of 8 KB: stages of x (two tiles each), weights
// and staging.
constexpr int kGroupSharedTiles = 28;
constexpr int kMaxGroupStages = 12;

// The most weight tiles of a group that may stay in shared memory: four stages of x fit beside
// them.
constexpr int kGroupResidentTiles = 18;

// Where weights stay, those of a group's last steps do so in registers, which leaves shared memory
// to x: of up to two steps, or of eight where all groups of a section are single rows, whose sums
// take half as many registers. A pair's are steps that serve both rows.
constexpr int kPairRegisterSteps = 2, kAloneRegisterSteps = 8;

// Weight tiles (12 MB) that L2 keeps beside x and y for groups that stream them.
constexpr int kGroupStreamedTiles = 1536;

// Token tiles (of 128) that a list of units is balanced for; any number computes the same. Where
// there are few it counts that lanes take whole tiles: the first list serves all numbers below 32,
// two numbers that training uses much have lists of their own, and the last one, as if tiles could
// be shared in any proportion, serves all others.
struct ListTokens {
  int32_t tiles;
  bool whole;
};
constexpr ListTokens kGroupTokenLists[] = {{16, true}, {32, true}, {64, true}, {128, false}};
constexpr int kGroupLists = sizeof(kGroupTokenLists) / sizeof(ListTokens);
constexpr int32_t kAnyTokenTiles = kGroupTokenLists[kGroupLists - 1].tiles;

// Up to so many token tiles (4096 tokens) a section for few tokens serves, if it has a list for
// them.
constexpr int32_t kFewTokenTiles = kGroupTokenLists[1].tiles;

// A set of row groups covering every output tile exactly once (rows with no blocks included).
struct GroupSection {
  int32_t num_groups;                  // 0: no schedule (block size not served)
  int32_t groups_offset;               // RowGroup[num_groups]
  int32_t steps_offset;                // GroupStep[...]
  int32_t quads_offset;                // GroupQuad[], block size 32 only
  int32_t units_offset;                // GroupUnit[], the lists one after the other
  int32_t num_units[2 * kGroupLists];  // of each: for products that save no slopes, then (forward
                                       // only) for those that do
  int32_t loads;                       // of all groups for a token tile, in tiles of 8 KB
  int32_t max_weights;                 // weight tiles of the largest group
  int32_t max_steps;                   // of that group
  int32_t resident_weights;            // of the largest group whose weights stay
  int32_t dense_groups;                // that load many more x tiles than the others
  int32_t register_steps;              // of each group: 0 .. kPairRegisterSteps, or eight
  int32_t ahead_blocks;                // of PlanHeader::thread_blocks: those that form t meanwhile
};

// The list of units for so many token tiles.
struct GroupUnitList {
  int32_t offset;
  int32_t count;
};
inline GroupUnitList unit_list(const GroupSection& section, int64_t token_tiles,
                               bool saves_slopes) {
  constexpr int32_t kWords = sizeof(GroupUnit) / sizeof(int32_t);
  int list = token_tiles < kGroupTokenLists[1].tiles ? 0 : kGroupLists - 1;
  for (int i = 1; i < kGroupLists; ++i) {
    if (token_tiles == kGroupTokenLists[i].tiles) list = i;
  }
  if (saves_slopes) list += kGroupLists;
  int32_t before = 0;
  for (int i = 0; i < list; ++i) before += section.num_units[i];
  return {section.units_offset + before * kWords, section.num_units[list]};
}

// Beside a dense row: lists of units for any number of token tiles that give it more or fewer
// lanes. A lane takes whole tiles, of which a dense row's last long: 128 tiles take 26 lanes as
// long as 31.
constexpr int kLaneLists = 12;

struct LaneList {
  int32_t dense_lanes;  // 0: no such list
  int32_t other_lanes;  // of the other group that takes longest
  int32_t other_ns;     // that this one takes for a token tile
};

struct LaneLists {
  int32_t units_offset;  // of all lists but the first, which is the section's last one
  int32_t dense_ns;      // that the dense row takes for a token tile
  LaneList list[kLaneLists];
};

// The list that is expected to be the quickest for so many token tiles.
inline GroupUnitList choose_lanes(GroupUnitList own, const LaneLists& lanes, int64_t token_tiles) {
  constexpr int32_t kWords = sizeof(GroupUnit) / sizeof(int32_t);
  int64_t least = 0;
  int best = 0;
  for (int i = 0; i < kLaneLists && lanes.list[i].dense_lanes > 0; ++i) {
    const LaneList& l = lanes.list[i];
    const int64_t dense = (token_tiles + l.dense_lanes - 1) / l.dense_lanes * lanes.dense_ns;
    const int64_t others = (token_tiles + l.other_lanes - 1) / l.other_lanes * l.other_ns;
    const int64_t time = dense > others ? dense : others;
    if (i > 0 && time >= least) continue;
    least = time;
    best = i;
  }
  if (best == 0) return own;
  return {lanes.units_offset + (best - 1) * own.count * kWords, own.count};
}

// Output tiles in the order in which product_split_sm90 takes them: those that read many more
// blocks than the mean (dense rows) first.
struct LongRows {
  int32_t order_offset;  // [output tiles]
  int32_t count;         // long ones
  int32_t most_others;   // blocks that the longest of the others reads
};

// Schedule of the product of all output rows at once (kernels/product_all_rows_sm90.cuh): a token
// tile's thread blocks, `parts` of them, each make up to six output tiles, three in each of two
// warpgroups, and read tiles of x in one order. Weight tiles are numbered as in GroupStep.
constexpr int kAllRowsOutputs = 3;    // of a warpgroup
constexpr int kMostAllRowsParts = 3;  // with low rank two, which then are a cluster
constexpr int kMostAllRowsColumns = 128;

struct AllRowsColumn {
  int32_t x_tile;
  int32_t uses;  // bit i + 3 (2 part + warpgroup): that warpgroup's i-th output tile reads it
};

struct AllRowsPart {
  int32_t rows[2][kAllRowsOutputs];  // of each warpgroup; -1: none
  int32_t num_rows[2];
  int32_t num_weights[2];
  int32_t steps_offset[2];  // weight tiles in the order of use, then ~row for each row, then a word
};

struct AllRowsSection {
  int32_t parts;           // 0: no schedule
  int32_t num_products;    // of a weight tile with a tile of x, in all parts
  int32_t num_columns;     // tiles of x that are read: with low rank all
  int32_t columns_offset;  // AllRowsColumn[num_columns]
  int32_t parts_offset;    // AllRowsPart[parts]
};

// Weight-gradient work of one thread block (kernels/weight_grad_sm90.cuh), in 64x64 tiles whatever
// the block size (32, 64 or 128): products of the tiles of [dz | s] and [x | t] that it loads, up
// to kGradOutputs in each of two warpgroups.
constexpr int kGradTiles = 12;
constexpr int kGradOutputs = 6;
constexpr int kGradBias = 2;  // tiles of dz that a warpgroup sums for dbias

enum GradSource : int32_t { kGradDz, kGradS, kGradX, kGradT };

// Products of one tile of [dz | s] with `size` tiles of [x | t], `step` apart: one wgmma.
struct GradRun {
  int32_t row;    // index into GradChunk::tile
  int32_t first;  // likewise
  int32_t step;
  int32_t size;  // 1..3
};

struct GradChunk {
  int32_t num_tiles;
  int32_t tile[kGradTiles];  // column tile << 2 | GradSource
  int32_t num_bias[2];
  int32_t bias[2][kGradBias];  // indices into tile
  int32_t unused;
  int32_t num_outputs[2];
  int32_t sizes[2];                 // the runs' sizes as decimal digits, falling: see kGradSizes
  GradRun run[2][kGradOutputs];     // cover the outputs in order
  int32_t output[2][kGradOutputs];  // destination, see GradOutput
};
static_assert(sizeof(GradChunk) % 16 == 0, "chunks are read as int4");

// What a warpgroup's runs can be. The last of each number of outputs serves whatever the others do
// not.
constexpr int32_t kGradSizes[] = {0,    1,  2,   11,    3,  21,  111, 31,   22,
                                  1111, 32, 221, 11111, 33, 321, 222, 2211, 111111};

// Where an output tile goes: kind in the top bits, index below.
enum GradOutput : int32_t {
  kGradBlock = 0,     // 64x64 part `index` of dB: (block, row half, column half); b = 32: quad
  kGradDu = 1 << 28,  // rows 64 i .. and ranks 64 j .. of du; index = i * rank tiles of 64 + j
  kGradDv = 2 << 28,  // columns 64 i .. and ranks 64 j .. of dv; index likewise
  kGradIndexMask = (1 << 28) - 1,
};

// One cut of the outputs into chunks.
struct GradList {
  int32_t num_chunks;     // 0: no such list
  int32_t chunks_offset;  // GradChunk[num_chunks]
  int32_t num_loads;      // of all chunks
  int32_t step_ps;        // the slowest chunk's stage, grad_step_ns() in picoseconds
  int32_t spread_ppm;     // grad_spread() in millionths
  int32_t most_tiles;     // of a chunk
  int32_t most_outputs;   // of a chunk
};

struct GradSection {
  GradList many;        // no list: block size not served
  GradList few;         // for fewer than 8192 tokens, mostly smaller chunks; or none
  int32_t num_outputs;  // of all chunks
};

struct PlanHeader {
  int32_t magic;
  int32_t version;
  int32_t size;  // int32 elements in the whole plan
  int32_t out_features;
  int32_t in_features;
  int32_t block_size;
  int32_t num_rows;  // block rows = ceil(out_features / block_size)
  int32_t num_cols;  // block columns = ceil(in_features / block_size)
  int32_t nnz;
  int32_t rank;
  int32_t rank_tiles;

  // Blocks are stored in row-major order of the layout, so block ids of row i are row_ptr[i] ..
  // row_ptr[i + 1] - 1.
  int32_t row_ptr_offset;  // [num_rows + 1]
  int32_t col_idx_offset;  // [nnz]
  int32_t row_idx_offset;  // [nnz]
  int32_t col_ptr_offset;  // [num_cols + 1], the transposed index
  int32_t t_row_offset;    // [nnz] block row of each block, column-major order
  int32_t t_block_offset;  // [nnz] block id of each block, column-major order
  int32_t max_row_blocks;
  int32_t max_col_blocks;
  LongRows long_rows;  // output tiles of 64 features
  LongRows long_cols;  // dx's

  // One on each multiprocessor: what Hopper's products and weight gradients are balanced for. Any
  // grid computes the same.
  int32_t thread_blocks;

  GroupSection forward;     // output rows = block rows, contraction over block columns
  GroupSection transposed;  // output rows = block columns, contraction over block rows (dx)
  GroupSection forward_few, transposed_few;  // for few tokens; no groups: as for many
  LaneLists forward_lanes[2];                // of `forward`: slopes not saved, saved
  LaneLists transposed_lanes;
  AllRowsSection forward_all, transposed_all;
  GradSection grad;
};
static_assert(sizeof(PlanHeader) == kPlanHeaderSize * sizeof(int32_t), "header layout");

// The section for so many token tiles.
inline const GroupSection& group_section(const PlanHeader& h, bool transposed,
                                         int64_t token_tiles) {
  const GroupSection& few = transposed ? h.transposed_few : h.forward_few;
  const bool listed = token_tiles < kFewTokenTiles
                          ? few.num_units[0] > 0
                          : token_tiles == kFewTokenTiles && few.num_units[1] > 0;
  if (few.num_groups > 0 && listed) return few;
  return transposed ? h.transposed : h.forward;
}

// Its list of units for them.
inline GroupUnitList group_units(const PlanHeader& h, bool transposed, int64_t token_tiles,
                                 bool saves_slopes) {
  const GroupSection& section = group_section(h, transposed, token_tiles);
  const GroupUnitList list = unit_list(section, token_tiles, saves_slopes);
  const LaneLists& lanes = transposed ? h.transposed_lanes : h.forward_lanes[saves_slopes];
  const bool any = section.num_groups > 0 &&
                   &section == (transposed ? &h.transposed : &h.forward) &&
                   list.offset == unit_list(section, kAnyTokenTiles, saves_slopes).offset;
  return any ? choose_lanes(list, lanes, token_tiles) : list;
}

}  // namespace pixelfly
