// Host planner: block layout -> plan (see pixelfly/schedule.h for the array it writes).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "pixelfly/schedule.h"

namespace pixelfly {

// A block layout in row-major order: block k sits at (row_idx[k], col_idx[k]).
struct LayoutView {
  int32_t out_features;
  int32_t in_features;
  int32_t block_size;
  int32_t rank;
  std::vector<int32_t> row_idx;
  std::vector<int32_t> col_idx;
  int32_t thread_blocks = kUsualThreadBlocks;  // see PlanHeader

  int32_t num_rows() const { return (out_features + block_size - 1) / block_size; }
  int32_t num_cols() const { return (in_features + block_size - 1) / block_size; }
  int32_t nnz() const { return static_cast<int32_t>(row_idx.size()); }
  int32_t rank_tiles() const { return (rank + block_size - 1) / block_size; }
};

// The int32 array under construction: a header followed by sections.
class PlanBuilder {
 public:
  PlanBuilder() : words_(kPlanHeaderSize, 0) {}

  // Appends `count` records of a trivially copyable T made of int32 fields; returns their offset.
  // Sections start at multiples of 4 words so that kernels can read records as int4.
  template <typename T>
  int32_t append(const std::vector<T>& records) {
    static_assert(sizeof(T) % sizeof(int32_t) == 0, "records are made of int32 fields");
    words_.resize((words_.size() + 3) / 4 * 4, 0);
    const auto offset = static_cast<int32_t>(words_.size());
    const auto* first = reinterpret_cast<const int32_t*>(records.data());
    words_.insert(words_.end(), first, first + records.size() * (sizeof(T) / sizeof(int32_t)));
    return offset;
  }

  std::vector<int32_t> finish(PlanHeader header);

 private:
  std::vector<int32_t> words_;
};

// Returns the plan; throws std::invalid_argument if the layout is malformed (indices out of range,
// not strictly row-major, more than 2^31 words) or thread_blocks is not positive.
std::vector<int32_t> build_plan(const LayoutView& layout);

// Groups of output rows for the product kernels. `transposed` plans dx: output rows are the
// layout's block columns.
struct GroupSections {
  GroupSection many;
  GroupSection few;    // no groups, or no list: `many`, which serves any number, does
  LaneLists lanes[2];  // of `many`: slopes not saved, saved
};
GroupSections append_row_groups(PlanBuilder& builder, const LayoutView& layout, bool transposed);

// Outputs for the product of all rows at once; no schedule where it does not serve: blocks of 32,
// more than 18 output tiles (12 with low rank, of up to 64 ranks) or 128 tiles of x, or a row
// without products.
AllRowsSection append_all_rows(PlanBuilder& builder, const LayoutView& layout, bool transposed);

// Tiles of shared memory beside a staging tile for either warpgroup: for stages of x and weights.
constexpr int32_t kGroupRoom = kGroupSharedTiles - 2;

// What a row group asks of a thread block for each token tile.
struct GroupWork {
  int32_t weights;       // products of a weight tile (64x64) with 128 tokens
  int32_t x_tiles;       // loads of 16 KB
  int32_t outputs;       // output tiles, 1 or 2
  bool dense;            // reads most of its x tiles when no other group does
  bool resident;         // its weights stay in shared memory
  int32_t stages;        // of x, at most
  int32_t in_registers;  // of the weights, if they stay

  int32_t in_shared() const { return weights - in_registers; }
  bool holds() const { return resident && in_registers > 0; }
  int32_t loads() const { return 2 * x_tiles + (resident ? 0 : weights); }  // of 8 KB
};

GroupWork work_of(const std::vector<GroupStep>& steps, int32_t outputs, int32_t rank_tiles);

// Sets `dense`, `resident` and `stages`, which depend on the other groups.
void compare_groups(std::vector<GroupWork>& groups);

// Whether most tiles of x serve both rows of a group.
bool share_x(const std::vector<GroupWork>& groups);

// Which groups run side by side: `together` consecutive ones at a time; or, if that is clearly
// quicker, all but the last `rest` of them in one turn, and these by all thread blocks after it.
struct Order {
  size_t together;
  size_t rest;
};

// The groups spread over thread blocks; in how many turns; how long the slowest of these is busy,
// with what turns cost, and how long they are busy in the mean, in products with the last list's
// tokens. Lanes cut for whole token tiles must be clearly better than those for any number.
struct Spread {
  std::vector<GroupUnit> units;
  size_t turns;
  double longest;
  double mean;
};
constexpr ListTokens kAnyTokens = kGroupTokenLists[kGroupLists - 1];
Spread spread_groups(const std::vector<GroupWork>& groups, Order order, int thread_blocks,
                     ListTokens tokens, bool saves_slopes = false);

// Lists beside `any`, the one for any number of tokens, that give a dense row other numbers of
// lanes; their units lie one after the other. None where no row is dense, or several are, or in
// turns.
struct OtherLanes {
  std::vector<GroupUnit> units;
  LaneLists lists;
};
OtherLanes vary_lanes(const std::vector<GroupWork>& groups, const Spread& any, int thread_blocks,
                      bool saves_slopes);

// How many of the thread blocks had better form t = x · vᵀ, of x_tiles tiles, beside the product
// than have it formed before; 0: none.
int32_t choose_ahead_blocks(const std::vector<GroupWork>& groups, Order order, int thread_blocks,
                            int32_t x_tiles);

// Work list of the weight-gradient kernel.
GradSection append_grad_chunks(PlanBuilder& builder, const LayoutView& layout);

}  // namespace pixelfly
