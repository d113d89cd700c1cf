// The launchers: the whole interface between the binding and the CUDA code. Each enqueues work on
// `stream` and returns without synchronising; T == 0 is a valid no-op (weight gradients are
// zeroed).
#pragma once

#include <cstddef>
#include <string>

#include "pixelfly/params.h"
#include "pixelfly/status.h"

// A cudaStream_t, without making every includer see the CUDA headers.
struct CUstream_st;

namespace pixelfly {

using Stream = CUstream_st*;

Status device_info(int32_t device_index, DeviceInfo* out);

Status launch_low_rank(const LowRankParams& p, const DeviceInfo& device, Stream stream);
size_t product_workspace(const ProductParams& p, const DeviceInfo& device);
Status launch_product(const ProductParams& p, const DeviceInfo& device, Stream stream);
// The same where tokens are columns (p.columns > 0), for which there are Hopper kernels alone.
Status launch_column_product(const ProductParams& p, const DeviceInfo& device, Stream stream);
size_t weight_grad_workspace(const WeightGradParams& p, const DeviceInfo& device);
Status launch_weight_grad(const WeightGradParams& p, const DeviceInfo& device, Stream stream);
// Whether products and weight gradients of these tokens take the gradient of a layer's output as
// three matrices.
bool takes_thirds(DType dtype, int64_t tokens, const PlanHeader& h, const DeviceInfo& device);
Status launch_activation_grad(const ActivationGradParams& p, const DeviceInfo& device,
                              Stream stream);
Status launch_round_weights(const RoundWeightsParams& p, const DeviceInfo& device, Stream stream);
Status launch_feature_sums(const FeatureSumsParams& p, const DeviceInfo& device, Stream stream);
Status launch_add_layer_norm(const AddLayerNormParams& p, const DeviceInfo& device, Stream stream);
size_t add_layer_norm_grad_workspace(const AddLayerNormGradParams& p, const DeviceInfo& device);
Status launch_add_layer_norm_grad(const AddLayerNormGradParams& p, const DeviceInfo& device,
                                  Stream stream);
Status launch_softmax_minus_target(const SoftmaxMinusTargetParams& p, const DeviceInfo& device,
                                   Stream stream);
// Hopper kernels alone; what they serve. For others there is torch's scaled_dot_product_attention.
bool short_attention_supports(DType dtype, int64_t tokens, int64_t features,
                              const DeviceInfo& device);
Status launch_short_attention(const ShortAttentionParams& p, const DeviceInfo& device,
                              Stream stream);
Status launch_short_attention_grad(const ShortAttentionGradParams& p, const DeviceInfo& device,
                                   Stream stream);

// Names of the kernels that would serve a call, for ops.explain: e.g. "product_sm90<b=64,
// resident>".
std::string explain_product(const ProductParams& p, const DeviceInfo& device);
std::string explain_weight_grad(const WeightGradParams& p, const DeviceInfo& device);
// How the product's t is formed.
std::string explain_low_rank(const ProductParams& p, const DeviceInfo& device);

}  // namespace pixelfly
