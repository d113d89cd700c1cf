// Which kernels would serve a call of the operator, for pixelfly.ops.explain.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "pixelfly/launch.h"

namespace pixelfly {

struct ExplainedCall {
  DType dtype;
  int64_t tokens;
  Activation activation;
  bool allow_tf32;
  bool deterministic;
};

// (step, kernel) in the order in which forward and backward start them. Rows are taken to be
// contiguous and aligned, as the binding makes them.
std::vector<std::pair<std::string, std::string>> explain_call(const ExplainedCall& call,
                                                              const PlanHeader& header,
                                                              const DeviceInfo& device);

}  // namespace pixelfly
