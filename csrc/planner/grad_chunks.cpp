#include "planner/plan.h"

namespace pixelfly {

GradSection append_grad_chunks(PlanBuilder&, const LayoutView&) { return {}; }

}  // namespace pixelfly
