// Operator schemas. Implementations: CUDA beside this file, CPU, fakes and autograd in
// pixelfly/ops.
//
// slope: act'(z) of the pre-activation z, whose gradient is then dz = dy * slope. For ReLU it may
// be any tensor that is positive where z is, as y. x_slope: x comes from an activation of that
// slope, and dx is the gradient of its pre-activation. Whoever made x then says so with dy_is_dz:
// its dy is that gradient already.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pixelfly, m) {
  m.def(
      "forward(Tensor x, Tensor blocks, Tensor? u, Tensor? v, Tensor? bias, Tensor? residual, "
      "Tensor plan, int[] header, int activation, bool save_slope, bool allow_tf32, "
      "Tensor? x_slope=None, bool dy_is_dz=False) "
      "-> (Tensor y, Tensor t, Tensor slope)");
  m.def(
      "backward(Tensor dy, Tensor x, Tensor blocks, Tensor? u, Tensor? v, Tensor t, "
      "Tensor? slope, Tensor plan, int[] header, bool relu, bool allow_tf32, "
      "bool deterministic, bool need_dx, bool need_dblocks, bool need_du, bool need_dv, "
      "bool need_dbias, Tensor? x_slope=None) "
      "-> (Tensor dx, Tensor dblocks, Tensor du, Tensor dv, Tensor dbias)");
}
