// pixelfly._C: the host planner and build information over NumPy arrays. The operators that live in
// the same library register themselves with torch when it is loaded (csrc/torch/library.cpp).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "planner/plan.h"
#ifdef PIXELFLY_WITH_CUDA
#include <cstring>
#include <stdexcept>

#include "launch/explain.h"
#endif

namespace py = pybind11;

namespace {

using IndexArray = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

py::array_t<int32_t> build_plan(int32_t out_features, int32_t in_features, int32_t block_size,
                                int32_t rank, const IndexArray& rows, const IndexArray& cols,
                                int32_t thread_blocks) {
  pixelfly::LayoutView layout{out_features,
                              in_features,
                              block_size,
                              rank,
                              {rows.data(), rows.data() + rows.size()},
                              {cols.data(), cols.data() + cols.size()},
                              thread_blocks};
  const std::vector<int32_t> plan = pixelfly::build_plan(layout);
  py::array_t<int32_t> out(static_cast<py::ssize_t>(plan.size()));
  std::copy(plan.begin(), plan.end(), out.mutable_data());
  return out;
}

py::dict build_info() {
  py::dict info;
#ifdef PIXELFLY_WITH_CUDA
  info["cuda"] = PIXELFLY_CUDA_VERSION;
  info["archs"] = PIXELFLY_ARCHS;
#else
  info["cuda"] = py::none();
  info["archs"] = "";
#endif
  info["version"] = PIXELFLY_VERSION;
  info["torch_headers"] = PIXELFLY_TORCH_VERSION;
  info["compiler"] = __VERSION__;
  return info;
}

#ifdef PIXELFLY_WITH_CUDA
std::vector<std::pair<std::string, std::string>> explain(const IndexArray& plan, int32_t dtype,
                                                         int64_t tokens, int32_t activation,
                                                         bool allow_tf32, bool deterministic,
                                                         int32_t arch, int32_t num_sms,
                                                         int32_t max_shared_bytes) {
  if (plan.size() < pixelfly::kPlanHeaderSize) throw std::invalid_argument("explain: not a plan");
  pixelfly::PlanHeader header;
  std::memcpy(&header, plan.data(), sizeof(header));
  const pixelfly::DeviceInfo device{0, arch, num_sms, max_shared_bytes};
  return pixelfly::explain_call(
      {static_cast<pixelfly::DType>(dtype), tokens, static_cast<pixelfly::Activation>(activation),
       allow_tf32, deterministic},
      header, device);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Host planner, build information and CUDA operators of pixelfly.";
  m.def("build_plan", &build_plan, py::arg("out_features"), py::arg("in_features"),
        py::arg("block_size"), py::arg("rank"), py::arg("row_indices"), py::arg("col_indices"),
        py::arg("thread_blocks") = pixelfly::kUsualThreadBlocks,
        "Plan of a block layout: int32 array, see csrc/include/pixelfly/schedule.h.");
#ifdef PIXELFLY_WITH_CUDA
  m.def("explain", &explain, py::arg("plan"), py::arg("dtype"), py::arg("tokens"),
        py::arg("activation"), py::arg("allow_tf32"), py::arg("deterministic"), py::arg("arch"),
        py::arg("num_sms"), py::arg("max_shared_bytes"),
        "(step, kernel) pairs that would serve a call on such a device; see ops.explain.");
#endif
  m.def("build_info", &build_info, "What this library was built with.");
}
