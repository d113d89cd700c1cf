#include "planner/plan.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace pixelfly {
namespace {

void check(const LayoutView& layout) {
  auto fail = [](const std::string& what) { throw std::invalid_argument("build_plan: " + what); };
  if (layout.out_features <= 0 || layout.in_features <= 0) fail("features must be positive");
  if (layout.block_size <= 0) fail("block_size must be positive");
  if (layout.rank < 0) fail("rank must not be negative");
  if (layout.thread_blocks <= 0) fail("thread_blocks must be positive");
  if (layout.row_idx.size() != layout.col_idx.size()) {
    fail("row_indices and col_indices must have one length");
  }
  const auto limit = static_cast<size_t>(std::numeric_limits<int32_t>::max());
  if (layout.row_idx.size() > limit / 64) fail("too many blocks for a 32-bit plan");
  int64_t previous = -1;
  for (size_t k = 0; k < layout.row_idx.size(); ++k) {
    const int32_t row = layout.row_idx[k], col = layout.col_idx[k];
    if (row < 0 || row >= layout.num_rows() || col < 0 || col >= layout.num_cols()) {
      fail("block " + std::to_string(k) + " at (" + std::to_string(row) + ", " +
           std::to_string(col) + ") lies outside the grid of " + std::to_string(layout.num_rows()) +
           " x " + std::to_string(layout.num_cols()));
    }
    const int64_t key = static_cast<int64_t>(row) * layout.num_cols() + col;
    if (key <= previous) fail("blocks must be in row-major order without repeats");
    previous = key;
  }
}

// Exclusive prefix sum of how often each key in [0, size) occurs.
std::vector<int32_t> pointers(const std::vector<int32_t>& keys, int32_t size) {
  std::vector<int32_t> ptr(static_cast<size_t>(size) + 1, 0);
  for (int32_t key : keys) ++ptr[static_cast<size_t>(key) + 1];
  for (size_t i = 1; i < ptr.size(); ++i) ptr[i] += ptr[i - 1];
  return ptr;
}

int32_t longest(const std::vector<int32_t>& ptr) {
  int32_t most = 0;
  for (size_t i = 1; i < ptr.size(); ++i) most = std::max(most, ptr[i] - ptr[i - 1]);
  return most;
}

// Of output tiles: `ptr` are the ends of the block rows' (or columns') lists of blocks.
LongRows append_long_rows(PlanBuilder& builder, const std::vector<int32_t>& ptr, int32_t tiles,
                          int32_t block_size) {
  constexpr double kMany = 1.5;  // blocks, times the mean
  auto blocks = [&](int32_t tile) {
    const auto row = static_cast<size_t>(tile * int64_t{kGroupTile} / block_size);
    return ptr[row + 1] - ptr[row];
  };
  double sum = 0;
  for (int32_t t = 0; t < tiles; ++t) sum += blocks(t);
  std::vector<int32_t> order, others;
  LongRows rows{};
  for (int32_t t = 0; t < tiles; ++t) {
    const bool is_long = blocks(t) * static_cast<double>(tiles) > kMany * sum;
    (is_long ? order : others).push_back(t);
    if (!is_long) rows.most_others = std::max(rows.most_others, blocks(t));
  }
  rows.count = static_cast<int32_t>(order.size());
  order.insert(order.end(), others.begin(), others.end());
  rows.order_offset = builder.append(order);
  return rows;
}

}  // namespace

std::vector<int32_t> PlanBuilder::finish(PlanHeader header) {
  header.magic = kPlanMagic;
  header.version = kPlanVersion;
  header.size = static_cast<int32_t>(words_.size());
  std::memcpy(words_.data(), &header, sizeof(header));
  return std::move(words_);
}

std::vector<int32_t> build_plan(const LayoutView& layout) {
  check(layout);
  PlanBuilder builder;
  PlanHeader header{};
  header.out_features = layout.out_features;
  header.in_features = layout.in_features;
  header.block_size = layout.block_size;
  header.num_rows = layout.num_rows();
  header.num_cols = layout.num_cols();
  header.nnz = layout.nnz();
  header.rank = layout.rank;
  header.rank_tiles = layout.rank_tiles();
  header.thread_blocks = layout.thread_blocks;

  const auto row_ptr = pointers(layout.row_idx, layout.num_rows());
  const auto col_ptr = pointers(layout.col_idx, layout.num_cols());
  std::vector<int32_t> t_row(layout.row_idx.size()), t_block(layout.row_idx.size());
  auto next = col_ptr;
  for (int32_t k = 0; k < layout.nnz(); ++k) {
    const int32_t at = next[static_cast<size_t>(layout.col_idx[k])]++;
    t_row[static_cast<size_t>(at)] = layout.row_idx[k];
    t_block[static_cast<size_t>(at)] = k;
  }
  header.row_ptr_offset = builder.append(row_ptr);
  header.col_idx_offset = builder.append(layout.col_idx);
  header.row_idx_offset = builder.append(layout.row_idx);
  header.col_ptr_offset = builder.append(col_ptr);
  header.t_row_offset = builder.append(t_row);
  header.t_block_offset = builder.append(t_block);
  header.max_row_blocks = longest(row_ptr);
  header.max_col_blocks = longest(col_ptr);
  header.long_rows =
      append_long_rows(builder, row_ptr, group_tiles(layout.out_features), layout.block_size);
  header.long_cols =
      append_long_rows(builder, col_ptr, group_tiles(layout.in_features), layout.block_size);

  const GroupSections forward = append_row_groups(builder, layout, /*transposed=*/false);
  const GroupSections transposed = append_row_groups(builder, layout, /*transposed=*/true);
  header.forward = forward.many;
  header.forward_few = forward.few;
  header.transposed = transposed.many;
  header.transposed_few = transposed.few;
  std::copy(std::begin(forward.lanes), std::end(forward.lanes), header.forward_lanes);
  header.transposed_lanes = transposed.lanes[0];
  header.forward_all = append_all_rows(builder, layout, /*transposed=*/false);
  header.transposed_all = append_all_rows(builder, layout, /*transposed=*/true);
  header.grad = append_grad_chunks(builder, layout);
  return builder.finish(header);
}

}  // namespace pixelfly
