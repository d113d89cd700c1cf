// Operator schemas. Implementations: CUDA beside this file, CPU, fakes and autograd in
// pixelfly/ops.
//
// forward and backward are plain kernels, without derivatives. linear is forward as programs that
// are traced or exported hold it: differentiable, and in Python alone, which takes it apart into
// the other two. An autograd kernel of forward itself would be Python on the way of every call of
// compiled code.
//
// linear takes float32 weights beside a 16-bit x, as autocast leaves them: it rounds them for the
// products, and their gradients come in float32 (float32_grads), never rounded.
//
// t: x vᵀ, None without low rank. The backward wants x and t only where gradients of weights are
// wanted; gradients that are not come as None.
//
// slope: act'(z) of the pre-activation z, whose gradient is then dz = dy * slope. With bfloat16 it
// is uint8 (device/slope_code.cuh), its rows a multiple of 16 bytes apart; with every other dtype
// it has x's. For ReLU (relu = True) the backward also takes any tensor of dy's dtype that is
// positive where z is, as y. x_slope, of slope's dtype: x comes from an activation of that slope,
// and dx is the gradient of its pre-activation. Whoever made x then says so with dy_is_dz: its dy
// is that gradient already.
//
// dy_k, dy_v: dy comes in thirds of y's features, dy [T, N / 3] itself being the first, as
// attention hands the gradients of q, k and v back. Hopper's kernels read them where they lie; for
// others they are joined. qkv is linear for a layer whose thirds are q, k and v [B, heads, tokens,
// N / 3 / heads], given as views of one tensor, x being [B, tokens, K]; its backward takes such
// gradients.
//
// add_layer_norm: h = x + delta and y = LayerNorm(h) over the last of any number of dimensions. h
// is None without delta: it would be x. ddelta is written where its dtype is not dx's, which
// otherwise serves as ddelta; dh is what reaches h from its other users. The kernels take a last
// dimension that is a multiple of 8, up to 16384, and contiguous tensors.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pixelfly, m) {
  m.def(
      "forward(Tensor x, Tensor blocks, Tensor? u, Tensor? v, Tensor? bias, Tensor? residual, "
      "Tensor plan, str header, int activation, bool save_slope, bool allow_tf32) "
      "-> (Tensor y, Tensor? t, Tensor? slope)");
  m.def(
      "backward(Tensor dy, Tensor? x, Tensor blocks, Tensor? u, Tensor? v, Tensor? t, "
      "Tensor? slope, Tensor plan, str header, bool relu, bool allow_tf32, "
      "bool deterministic, bool need_dx, bool need_dblocks, bool need_du, bool need_dv, "
      "bool need_dbias, Tensor? x_slope, bool float32_grads, Tensor? dy_k=None, Tensor? dy_v=None) "
      "-> (Tensor? dx, Tensor? dblocks, Tensor? du, Tensor? dv, Tensor? dbias)");
  m.def(
      "linear(Tensor x, Tensor blocks, Tensor? u, Tensor? v, Tensor? bias, Tensor? residual, "
      "Tensor plan, str header, int activation, bool save_slope, bool allow_tf32, "
      "Tensor? x_slope, bool dy_is_dz) "
      "-> (Tensor y, Tensor? slope)");
  m.def(
      "qkv(Tensor x, Tensor blocks, Tensor? u, Tensor? v, Tensor? bias, Tensor plan, str header, "
      "bool allow_tf32, int heads) -> (Tensor q, Tensor k, Tensor v)");
  m.def(
      "add_layer_norm(Tensor x, Tensor? delta, Tensor weight, Tensor bias, float eps, "
      "ScalarType y_dtype) -> (Tensor y, Tensor? h, Tensor mean, Tensor rstd)");
  m.def(
      "add_layer_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor mean, "
      "Tensor rstd, ScalarType? ddelta_dtype, bool need_weights) "
      "-> (Tensor dx, Tensor? ddelta, Tensor? dweight, Tensor? dbias)");
  // The weights in a 16-bit dtype, rounded from float32 or copied, in one launch: eager code's
  // (inductor fuses its own casts). With a tile, matrices come as a layout of every block has them:
  // [ceil(n / tile) * ceil(k / tile), tile, tile], zero beyond the matrix.
  m.def("round_weights(Tensor[] weights, ScalarType dtype, int tile) -> Tensor[]");
  // Sums over samples and columns of tensors [S, features, C], in float32 and in one launch.
  m.def("feature_sums(Tensor[] tensors) -> Tensor[]");
  // weight · x for every sample, or weightᵀ · x: x [S, in, C], y [S, out, C], and weight in the
  // blocks of a layout whose sizes are out and in rounded up (what lies beyond them is zero). The
  // slope is act'(weight · x + bias), in an order that only this operator reads: with transposed,
  // y comes times such a slope.
  m.def(
      "column_product(Tensor x, Tensor blocks, Tensor? bias, Tensor? slope, Tensor plan, "
      "str header, int out_features, int activation, bool save_slope, bool transposed) "
      "-> (Tensor y, Tensor? slope)");
  // Cross entropy of rows [T, columns] of which the first `classes` are logits, and in their place
  // its gradient, softmax - [target], where `write` asks for it. loss [T] is float32.
  m.def(
      "softmax_minus_target_(Tensor(a!) logits, Tensor target, int classes, int ignore_index, "
      "bool write) -> Tensor loss");
  // softmax(scale q kᵀ) v of every sample and head, every score: qkv [B, T, 3 * heads * D], y [B,
  // T, heads * D], both as a layer's rows lie; log_sum [B, heads, T] is log Σ exp(scale q kᵀ) in
  // float32, for the gradient of all of qkv. The kernels are Hopper's, for D = 64 and up to 208
  // tokens in 16 bits.
  m.def("short_attention(Tensor qkv, int heads, float scale) -> (Tensor y, Tensor log_sum)");
  m.def(
      "short_attention_backward(Tensor dy, Tensor qkv, Tensor y, Tensor log_sum, int heads, "
      "float scale) -> Tensor dqkv");
}
