#include "launch/heuristics.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "launch/product_all_rows_sm90.h"
#include "launch/product_few_sm80.h"
#include "launch/product_sm90.h"
#include "launch/product_split_sm90.h"
#include "launch/weight_grad_sm90.h"

namespace pixelfly {
namespace {

Status cannot(const char* forced, const char* what) {
  return Status::unsupported(std::string("PIXELFLY_KERNEL=") + forced + " cannot serve this " +
                             what +
                             ": it needs a Hopper GPU, a 16-bit dtype, 16-byte aligned rows "
                             "and a block size and rank that the kernel covers");
}

Status unknown() {
  return Status::invalid("PIXELFLY_KERNEL must be auto, sm80, few, split, all_rows or sm90");
}

// Times in ns of products alone, fitted to those of one H200 (few_tokens_h200.json): "split_us",
// before thread blocks of product_split_sm90 had multiprocessors to themselves, and of clusters for
// long rows "long_rows_us".
constexpr double kTileBytes = kGroupTile * kGroupTile * 2;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Products of a weight tile with a tile of tokens.
int64_t tile_products(const ProductParams& p, int64_t tokens) {
  const PlanHeader& h = *p.header;
  const int64_t parts = h.block_size / kGroupTile;
  return (h.nnz * parts * parts + group_tiles(p.out_features) * group_tiles(h.rank)) *
         ceil_div(p.tokens, tokens);
}

// The longest row's steps, or a multiprocessor's share of all; or what all of them load.
double split_time(const ProductParams& p, const SplitTile& tile, const DeviceInfo& device) {
  constexpr double kStart = 2870, kLoadedByAll = 6270;
  const double added = tile.long_only ? 20 : 9;  // bytes of sums by a thread block
  const double late = tile.long_only ? .3 : 0;   // of a long row's own steps: they end last
  const PlanHeader& h = *p.header;
  const int tokens = kGroupTile * tile.warpgroups;
  const double step = tile.warpgroups == 1 ? 175 : 242;
  const LongRows& long_rows = p.transposed ? h.long_cols : h.long_rows;
  const auto steps_of = [&](int64_t blocks) {
    return blocks * (h.block_size / kGroupTile) + group_tiles(h.rank);
  };
  const int64_t most = steps_of(p.transposed ? h.max_col_blocks : h.max_row_blocks);
  const int64_t alone = tile.long_only ? steps_of(long_rows.most_others) : 0;
  const int64_t own = ceil_div(most, tile.cluster);
  const auto longest = static_cast<double>(std::max(own, alone));
  const auto products = static_cast<double>(tile_products(p, tokens));
  const double share = products / device.num_sms;
  const double loads = products * (1 + tile.warpgroups) * kTileBytes / kLoadedByAll;
  const int64_t shared = tile.long_only ? long_rows.count : group_tiles(p.out_features);
  const int64_t blocks = shared * ceil_div(p.tokens, tokens) * tile.cluster;
  const double turns = std::max(1., static_cast<double>(blocks) / device.num_sms);
  const double sent = 2 * kTileBytes * tile.warpgroups * (1 - 1. / tile.cluster);
  return kStart + std::max(step * std::max(longest, share), loads) + sent / added * turns +
         late * step * static_cast<double>(own);
}

// product_sm90's, whose thread blocks store one or two output tiles of 128 tokens.
double groups_time(const ProductParams& p, const DeviceInfo& device) {
  constexpr double kStart = 3840, kLoaded = 93.5, kLoadedByAll = 9600;
  const int64_t token_tiles = ceil_div(p.tokens, 2 * kGroupTile);
  const GroupSection& section = group_section(*p.header, p.transposed, token_tiles);
  const int most = 2 * section.max_steps + section.max_weights;  // tiles that a thread block loads
  const double all = static_cast<double>(tile_products(p, 2 * kGroupTile)) * most /
                     std::max(1, section.max_weights);
  const double one = std::max<double>(most, all / device.num_sms);
  return kStart + kTileBytes * std::max(one / kLoaded, all / kLoadedByAll);
}

// product_few_sm80's, whose thread blocks load fragments for 16 features of 64 tokens.
double few_time(const ProductParams& p) {
  constexpr double kStart = 2450, kLoaded = 77, kLoadedByAll = 4435;
  constexpr int kTokens = kGroupTile, kFeatures = 16;
  const PlanHeader& h = *p.header;
  const int64_t most = p.transposed ? h.max_col_blocks : h.max_row_blocks;
  const int64_t one = (kTokens + kFeatures) * (most * h.block_size + h.rank) * 2;
  const int64_t of_tile = kGroupTile / kFeatures * (kTokens + kFeatures) * kGroupTile * 2;
  const int64_t all = tile_products(p, kTokens) * of_tile;
  return kStart +
         std::max(static_cast<double>(one) / kLoaded, static_cast<double>(all) / kLoadedByAll);
}

}  // namespace

const char* name_of(Path path) {
  switch (path) {
    case Path::kHopper: return "sm90";
    case Path::kFew: return "few_sm80";
    case Path::kSplit: return "split_sm90";
    case Path::kAllRows: return "all_rows_sm90";
    default: return "sm80";
  }
}

Forced forced_path() {
  const char* value = std::getenv("PIXELFLY_KERNEL");
  if (value == nullptr || *value == '\0' || std::strcmp(value, "auto") == 0) return Forced::kAuto;
  if (std::strcmp(value, "sm80") == 0) return Forced::kSm80;
  if (std::strcmp(value, "few") == 0) return Forced::kFew;
  if (std::strcmp(value, "split") == 0) return Forced::kSplit;
  if (std::strcmp(value, "all_rows") == 0) return Forced::kAllRows;
  if (std::strcmp(value, "sm90") == 0) return Forced::kHopper;
  return Forced::kUnknown;
}

Choice choose_product(const ProductParams& p, const DeviceInfo& device, Forced forced) {
  const bool hopper = product_sm90_supports(p, device);
  switch (forced) {
    case Forced::kSm80: return {};
    case Forced::kFew:
      if (product_few_sm80_supports(p)) return {Path::kFew, Status::success()};
      if (p.transposed) break;  // a backward of more tokens runs as it would
      return {Path::kFew,
              Status::unsupported("PIXELFLY_KERNEL=few cannot serve this product: it needs at most "
                                  "256 tokens, a 16-bit dtype, 16-byte aligned rows and "
                                  "blocks of 32 or more")};
    case Forced::kSplit:
      return {Path::kSplit, product_split_sm90_supports(p, device) ? Status::success()
                                                                   : cannot("split", "product")};
    case Forced::kAllRows:
      if (product_all_rows_sm90_supports(p, device)) return {Path::kAllRows, Status::success()};
      if (p.transposed || p.header->transposed_all.parts > 0) break;  // the other one may be served
      return {Path::kAllRows,
              Status::unsupported(
                  "PIXELFLY_KERNEL=all_rows cannot serve this product: it needs a Hopper GPU, a "
                  "16-bit dtype, 16-byte aligned rows, blocks of 64 or 128, at most 1152 outputs "
                  "(768 and ranks up to 64 with low rank) and 8192 inputs, a block in every row or "
                  "low rank, and no activation and no residual")};
    case Forced::kHopper:
      return {Path::kHopper, hopper ? Status::success() : cannot("sm90", "product")};
    case Forced::kUnknown: return {Path::kSm80, unknown()};
    default: break;
  }
  // Weight tiles of blocks of 32 come in four boxes each: product_sm90 then takes longer.
  const int64_t always = hopper && p.header->block_size >= kGroupTile ? kFewTokens / 2 : kFewTokens;
  const bool few = product_few_sm80_supports(p) &&
                   few_tokens_are_quick(p.tokens, p.out_features, device, always);
  const bool t_beside = !few && p.factor_in != nullptr && product_sm90_forms_t(p, device);
  if (!t_beside && product_split_sm90_supports(p, device) && split_is_quick(p, few, device)) {
    return {Path::kSplit, Status::success()};
  }
  if (few) return {Path::kFew, Status::success()};
  if (product_all_rows_sm90_supports(p, device) && all_rows_are_quick(p, device)) {
    return {Path::kAllRows, Status::success()};
  }
  return {hopper ? Path::kHopper : Path::kSm80, Status::success()};
}

SplitTile split_tile(const ProductParams& p, const DeviceInfo& device) {
  SplitTile best{};
  double least = 0;
  const bool any_long = (p.transposed ? p.header->long_cols : p.header->long_rows).count > 0;
  for (const int warpgroups : {1, 2}) {
    for (const int cluster : {1, 2, 4, 8}) {
      for (const bool long_only : {false, true}) {
        if (long_only && (cluster == 1 || !any_long)) continue;
        const SplitTile tile{warpgroups, cluster, long_only};
        const double time = split_time(p, tile, device);
        if (best.cluster > 0 && time >= least) continue;
        best = tile;
        least = time;
      }
    }
  }
  return best;
}

bool split_is_quick(const ProductParams& p, bool few, const DeviceInfo& device) {
  constexpr int64_t kMostTokens = 2048;  // beyond, product_sm90 keeps weights and shares x
  // In a training step so much of what it gains alone is lost (few_tokens_h200.json,
  // "split_steps_us").
  const double lost = few ? 2200 : 1500;
  if (p.tokens <= kFewTokens || p.tokens > kMostTokens) return false;
  const double other = few ? few_time(p) : groups_time(p, device);
  return split_time(p, split_tile(p, device), device) < other - lost;
}

AllRowsTurns all_rows_turns(const ProductParams& p, const DeviceInfo& device) {
  const AllRowsSection& section = p.transposed ? p.header->transposed_all : p.header->forward_all;
  const int64_t thread_blocks = std::min(device.num_sms, p.header->thread_blocks);
  const int64_t sets = std::max<int64_t>(1, thread_blocks / section.parts);
  const int64_t tiles = ceil_div(p.tokens, 2 * kGroupTile), rest = tiles % sets;
  const int64_t whole = 2 * rest <= sets ? tiles - rest : tiles;
  const int64_t left = std::max<int64_t>(0, p.tokens - whole * 2 * kGroupTile);
  return {static_cast<int32_t>(sets), static_cast<int32_t>(whole),
          static_cast<int32_t>(ceil_div(left, kGroupTile))};
}

// Times in ns, fitted to those of one H200 (product_all_rows_sm90_h200.json, "paths"): of layers of
// 4096 to 50432 tokens that narrow to a half or less, within 11 % of all rows', 26 % of the other.
bool all_rows_are_quick(const ProductParams& p, const DeviceInfo& device) {
  const PlanHeader& h = *p.header;
  const AllRowsSection& all = p.transposed ? h.transposed_all : h.forward_all;
  const int64_t x_tiles = group_tiles(p.in_features);
  if (x_tiles < 2 * group_tiles(p.out_features)) return false;
  const int64_t tiles = ceil_div(p.tokens, 2 * kGroupTile);
  const bool low_rank = h.rank > 0;
  // Turns of all thread blocks over the token tiles; the last one, of some or of half tiles, is
  // quicker.
  constexpr double kAllStart = 1640, kTile = 2870, kProduct = 205, kColumn = 34, kColumnOfT = 213;
  constexpr double kSomeTurn = .585, kHalfTurn = .67;
  const double tile = kTile + kProduct * all.num_products / all.parts +
                      (kColumn + (low_rank ? kColumnOfT : 0)) * all.num_columns;
  const AllRowsTurns cut = all_rows_turns(p, device);
  const double rest = static_cast<double>(cut.whole_tiles % cut.sets) / cut.sets;
  double turns = cut.whole_tiles / cut.sets;
  if (rest > 0) turns += kSomeTurn + (1 - kSomeTurn) * rest;
  if (cut.half_tiles > 0) turns += kHalfTurn;
  // product_sm90 by what it loads, and the reading of x for t before it.
  constexpr double kStart = 5450, kTokenTile = 51.6, kLoad = .826, kDense = 1.057;
  constexpr double kStartOfT = 5270, kReadForT = 3.56;
  const GroupSection& groups = group_section(h, p.transposed, tiles);
  const auto token_tiles = static_cast<double>(tiles);
  double other = kStart + token_tiles * (kTokenTile + kLoad * groups.loads) *
                              (groups.dense_groups > 0 ? kDense : 1);
  if (low_rank) other += kStartOfT + kReadForT * token_tiles * static_cast<double>(x_tiles);
  return kAllStart + turns * tile < other;
}

Choice choose_weight_grad(const WeightGradParams& p, const DeviceInfo& device, Forced forced) {
  const bool hopper = weight_grad_sm90_supports(p, device);
  switch (forced) {
    case Forced::kSm80:
    case Forced::kFew: return {};
    case Forced::kHopper:
      return {Path::kHopper, hopper ? Status::success() : cannot("sm90", "weight gradient")};
    case Forced::kUnknown: return {Path::kSm80, unknown()};
    default: break;
  }
  return {hopper ? Path::kHopper : Path::kSm80, Status::success()};
}

Status refuse_thirds() {
  return Status::unsupported(
      "a gradient in thirds needs the kernels for Hopper, 16-byte aligned rows and thirds of a "
      "multiple of 64 features");
}

bool takes_thirds(DType dtype, int64_t tokens, const PlanHeader& h, const DeviceInfo& device) {
  if (h.out_features % (3 * kGroupTile) != 0) return false;
  ProductParams p{};
  p.dtype = dtype;
  p.transposed = true;
  p.tokens = tokens;
  p.in_features = h.out_features;
  p.out_features = h.in_features;
  p.header = &h;
  WeightGradParams g{};
  g.dtype = dtype;
  g.tokens = tokens;
  g.header = &h;
  const Forced forced = forced_path();
  const Choice dx = choose_product(p, device, forced), dw = choose_weight_grad(g, device, forced);
  // For thirds product_sm90 takes the place of all rows at once.
  const bool product = takes_thirds(dx.path) || dx.path == Path::kAllRows;
  const bool hopper = product && dw.path == Path::kHopper;
  return hopper && dx.status.ok() && dw.status.ok();
}

}  // namespace pixelfly
