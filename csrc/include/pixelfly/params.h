// Launch parameters: plain pointers, sizes, and strides in elements. A contiguous last dimension is
// assumed everywhere. Letters: T tokens, K in_features, N out_features, b block size, r rank.
#pragma once

#include <cstdint>

#include "pixelfly/dtype.h"
#include "pixelfly/schedule.h"

namespace pixelfly {

// The device a launch goes to; filled once per device by launch/device_info.
struct DeviceInfo {
  int32_t index = 0;
  int32_t arch = 0;  // 10 * major + minor
  int32_t num_sms = 0;
  int32_t max_shared_bytes = 0;  // opt-in limit per thread block
};

// The second and third of three matrices of one width that stand side by side for an operand: the
// gradients of q, k and v, as attention hands them back. Null: the operand is one matrix. Hopper's
// kernels alone take three, of a width that is a multiple of 64 (takes_thirds() in launch.h).
struct OtherThirds {
  const void* data[2];
  int64_t stride[2];

  bool given() const { return data[0] != nullptr; }
};

// t = x · vᵀ, or s = dz · u when `transposed` (factor is then [features, rank]).
struct LowRankParams {
  DType dtype;
  bool allow_tf32;  // fp32 only: TF32 tensor cores; otherwise plain fp32 arithmetic
  bool transposed;
  int64_t tokens;
  int32_t features;  // contraction length: K (forward) or N (transposed)
  int32_t rank;
  const void* x;  // [T, features]; its first third if x_others are given
  int64_t x_stride;
  OtherThirds x_others;  // transposed only
  const void* factor;    // v: [rank, K] row-major; transposed: u: [N, rank] row-major
  int64_t factor_stride;
  void* t;  // [T, rank], row stride t_stride (a multiple of 8 elements)
  int64_t t_stride;
};

// y = act(x · Bᵀ + t · uᵀ + bias) + residual             (transposed == false)
// dx = (dz · B + s · v) ⊙ slope                          (transposed == true; ⊙ only if given)
//
// With `columns`, tokens are columns: x, slopes and y are [samples][features][columns], contiguous,
// and their strides are not used; tokens == samples * columns. No low rank and no residual. Slopes
// in codes then have an order of their own (kernels/product_sm90_columns.cuh).
struct ProductParams {
  DType dtype;
  bool allow_tf32;
  bool transposed;
  int64_t tokens;
  int32_t columns;       // 0: tokens are rows
  int32_t in_features;   // contraction features: K, or N when transposed
  int32_t out_features;  // result features: N, or K when transposed
  const void* x;         // [T, in_features]; its first third if x_others are given
  int64_t x_stride;
  OtherThirds x_others;   // transposed only
  const void* blocks;     // [nnz, b, b]: out x in inside a block, whatever `transposed` is
  const void* factor_in;  // v: [rank, K]; transposed: u: [N, rank]; null: t is given or rank is 0
  int64_t factor_in_stride;
  void* t;  // [T, rank] or null: written if factor_in is given (t = x · vᵀ), else read
  int64_t t_stride;
  const void* factor;  // u: [N, rank]; transposed: v: [rank, K]; null without low rank
  int64_t factor_stride;
  const void* bias;      // [out_features] or null
  const void* residual;  // [T, out_features] or null
  int64_t residual_stride;
  const void* slope;  // [T, out_features] of slope_dtype(): multiplies the result (transposed only)
  int64_t slope_stride;
  Activation activation;  // not transposed only
  void* y;                // [T, out_features]
  int64_t y_stride;
  void* slope_out;  // [T, out_features] of slope_dtype(): act'(x · Bᵀ + t · uᵀ + bias), or null
  int64_t slope_out_stride;
  void* workspace;           // product_workspace() bytes, 256-byte aligned, uninitialised
  const PlanHeader* header;  // host
  const int32_t* plan;       // device
};

// How a product's t is formed, if factor_in is given.
inline LowRankParams low_rank_of(const ProductParams& p) {
  LowRankParams q{};
  q.dtype = p.dtype;
  q.allow_tf32 = p.allow_tf32;
  q.transposed = p.transposed;
  q.tokens = p.tokens;
  q.features = p.in_features;
  q.rank = p.header->rank;
  q.x = p.x;
  q.x_stride = p.x_stride;
  q.x_others = p.x_others;
  q.factor = p.factor_in;
  q.factor_stride = p.factor_in_stride;
  q.t = p.t;
  q.t_stride = p.t_stride;
  return q;
}

// dB[k] = dzᵀ_i x_j for every kept block, du = dzᵀ t, dv = sᵀ x, dbias = Σ_T dz. Null outputs are
// skipped. Sums are fp32; results are rounded once to `grad_dtype`, unless that is fp32.
struct WeightGradParams {
  DType dtype;
  DType grad_dtype;  // of the outputs: dtype or kFloat32
  bool allow_tf32;
  bool deterministic;
  int64_t tokens;
  int32_t in_features;
  int32_t out_features;
  const void* dz;  // [T, N]; its first third if dz_others are given
  int64_t dz_stride;
  OtherThirds dz_others;
  const void* x;  // [T, K]
  int64_t x_stride;
  const void* t;  // [T, rank] or null
  int64_t t_stride;
  const void* s;  // [T, rank] or null
  int64_t s_stride;
  void* dblocks;    // [nnz, b, b] contiguous, aligned to 16 bytes as du and dv are
  void* du;         // [N, rank] contiguous
  void* dv;         // [rank, K] contiguous
  void* dbias;      // [N]
  void* workspace;  // weight_grad_workspace() bytes, 256-byte aligned, uninitialised
  const PlanHeader* header;
  const int32_t* plan;
};

// A weight in the dtype of a product: rounded from fp32, or copied.
struct RoundedWeight {
  const void* source;  // contiguous
  void* target;        // contiguous, aligned to 16 bytes
  bool wide;           // source is fp32; else it has the target's dtype
  int64_t size;        // elements of the target
  // 0: the target lies as the source does. Else source is [rows, columns] and target its tiles,
  // [ceil(rows / tile) · ceil(columns / tile), tile, tile], zero beyond the source.
  int32_t tile;
  int64_t rows;
  int64_t columns;
};
constexpr int kMaxRoundedWeights = 8;
struct RoundWeightsParams {
  DType dtype;  // of the targets: 16-bit
  int32_t count;
  RoundedWeight weights[kMaxRoundedWeights];
};

// out[f] = Σ x over samples and columns, fp32.
struct FeatureSum {
  const void* x;  // [samples][features][columns], contiguous, aligned to 16 bytes
  float* out;     // [features]
  int64_t samples;
  int64_t columns;  // a multiple of 8
  int32_t features;
};
constexpr int kMaxFeatureSums = 4;
struct FeatureSumsParams {
  DType dtype;  // of x
  int32_t count;
  FeatureSum sums[kMaxFeatureSums];
};

// dz = dy ⊙ slope, elementwise over [T, N]; for ReLU, dz = dy where slope > 0: it may be y itself.
struct ActivationGradParams {
  DType dtype;
  DType slope_dtype;  // slope_dtype(dtype), for ReLU also dtype
  bool relu;
  int64_t tokens;
  int32_t features;
  const void* dy;
  int64_t dy_stride;
  const void* slope;
  int64_t slope_stride;
  void* dz;
  int64_t dz_stride;
};

// h = x + delta (h is x where delta is null), y = LayerNorm(h) * weight + bias over the last
// dimension. C features, a multiple of 8; all rows are contiguous and aligned to 16 bytes. Beside
// an fp32 x, delta and y may be 16-bit, then of one dtype; beside a 16-bit x they have its dtype.
struct AddLayerNormParams {
  DType dtype;  // of x and h
  DType delta_dtype;
  DType y_dtype;
  DType weight_dtype;  // of weight and bias: dtype or kFloat32
  int64_t tokens;
  int32_t features;
  float eps;
  const void* x;       // [T, C]
  const void* delta;   // [T, C] or null
  const void* weight;  // [C]
  const void* bias;    // [C]
  void* y;             // [T, C]
  void* h;             // [T, C], null where delta is
  float* mean;         // [T], of h's rows
  float* rstd;         // [T], 1 / sqrt(variance + eps)
};

// dx = dh + LayerNorm's gradient, dweight = Σ_T dy ⊙ (h - mean) rstd, dbias = Σ_T dy. Dtypes as
// above.
struct AddLayerNormGradParams {
  DType dtype;         // of h, dh and dx
  DType delta_dtype;   // of ddelta, where that is given: not dtype
  DType y_dtype;       // of dy
  DType weight_dtype;  // of weight, dweight and dbias
  int64_t tokens;
  int32_t features;
  const void* dy;      // [T, C]
  const void* dh;      // [T, C]: what reaches h from its other users, or null
  const void* h;       // [T, C]
  const void* weight;  // [C]
  const float* mean;   // [T]
  const float* rstd;   // [T]
  void* dx;            // [T, C]
  void* ddelta;        // [T, C]: dx before it was rounded to dtype, or null
  void* dweight;       // [C]; null: neither it nor dbias is wanted
  void* dbias;         // [C]
  void* workspace;     // add_layer_norm_grad_workspace() bytes, 256-byte aligned, uninitialised
};

// loss = log Σ exp(logits) - logits[target], 0 where the target is ignore_index, NaN where it is
// another number that is no class; logits := softmax(logits) - [target], or zeros, or NaN. Columns
// from `classes` on are padding: they are not read, and zero is written.
struct SoftmaxMinusTargetParams {
  DType dtype;  // of logits: 16 bits
  int64_t tokens;
  int32_t columns;  // a multiple of 8
  int32_t classes;
  int64_t ignore_index;
  bool write;             // whether logits are replaced
  void* logits;           // [T, columns]
  int64_t stride;         // of its rows, a multiple of 8
  const int64_t* target;  // [T]
  float* loss;            // [T]
};

// y = softmax(scale q kᵀ) v for every sample and head, all keys of a sample in shared memory. Heads
// have 64 features. Everything is contiguous and starts at a multiple of 16 bytes.
struct ShortAttentionParams {
  DType dtype;  // of qkv and y: 16 bits
  int32_t samples;
  int32_t tokens;  // at most kShortAttentionTokens
  int32_t heads;
  float scale;
  const void* qkv;  // [samples, tokens, 3, heads, 64]
  void* y;          // [samples, tokens, heads, 64]
  float* log_sum;   // [samples, heads, tokens]: log Σ exp(scale q kᵀ), for the gradient
};

// The gradient of qkv. Deterministic.
struct ShortAttentionGradParams {
  DType dtype;
  int32_t samples;
  int32_t tokens;
  int32_t heads;
  float scale;
  const void* qkv;       // as above
  const void* y;         // as above
  const float* log_sum;  // as above
  const void* dy;        // [samples, tokens, heads, 64]
  void* dqkv;            // [samples, tokens, 3, heads, 64]
};

constexpr int kShortAttentionTokens = 208;
constexpr int kShortAttentionFeatures = 64;

}  // namespace pixelfly
