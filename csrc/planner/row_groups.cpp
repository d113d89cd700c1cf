#include "planner/plan.h"

namespace pixelfly {

GroupSection append_row_groups(PlanBuilder&, const LayoutView&, bool) { return {}; }

}  // namespace pixelfly
