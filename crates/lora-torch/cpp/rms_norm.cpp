// RMS normalisation (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019), of which only the input and a
// reciprocal a row are kept: operations of libtorch's own would keep two or three tensors in f32 beside them.

#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

#include <optional>
#include <vector>

#include "guard.h"
#include "dry/dry.h"

namespace lora::rms_norm {

// How the weight comes in, in the order of `RmsWeight` in src/norm.rs: after rounding to the input's type, before it,
// and before it with 1 added.
enum Way : int64_t { ROUNDED, SINGLE, ONE_PLUS };

torch::Tensor single_copy(const torch::Tensor &tensor) {
  return tensor.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true);
}

// The weight in f32, with 1 added where that is its way.
torch::Tensor factor_of(const torch::Tensor &weight, int64_t way) {
  const torch::Tensor single = weight.to(at::kFloat);
  return way == ONE_PLUS ? single.add(1) : single;
}

struct RmsNorm : torch::autograd::Function<RmsNorm> {
  static torch::Tensor forward(torch::autograd::AutogradContext *context, const torch::Tensor &input,
                               const std::optional<torch::Tensor> &weight, double epsilon, int64_t way) {
    const auto kind = input.scalar_type();
    torch::Tensor normed, reciprocal;
    if (lora::dry::as_on_cpu(input)) {
      const torch::Tensor single = input.to(at::kFloat);
      normed = single.square();
      reciprocal = normed.mean({-1}, /*keepdim=*/true).add_(epsilon).rsqrt_();
      at::mul_out(normed, single, reciprocal);
    } else {
      // Kernels of devices convert numbers as they read and write them.
      reciprocal = at::linalg_vector_norm(input, 2, at::IntArrayRef({-1}), true, at::kFloat);
      reciprocal.square_().div_(input.size(-1)).add_(epsilon).rsqrt_();
      normed = at::empty(input.sizes(), input.options().dtype(way == ROUNDED ? kind : at::kFloat));
      at::mul_out(normed, input, reciprocal);
    }
    const torch::Tensor own = weight.value_or(torch::Tensor());
    context->save_for_backward({input, own, reciprocal});
    context->saved_data["way"] = way;
    if (!own.defined()) return normed.to(kind);
    if (way == ROUNDED) return normed.to(kind).mul_(own.to(kind));
    return normed.mul_(factor_of(own, way)).to(kind);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *context,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const torch::Tensor &input = saved[0], &weight = saved[1], &reciprocal = saved[2];
    const torch::Tensor normed = single_copy(input).mul_(reciprocal);
    torch::Tensor given = single_copy(gradients[0]), to_input, to_weight;
    if (weight.defined() && context->needs_input_grad(1)) {
      to_weight = given.mul(normed).reshape({-1, input.size(-1)}).sum({0}).to(weight.scalar_type());
    }
    if (context->needs_input_grad(0)) {
      if (weight.defined()) given.mul_(factor_of(weight, context->saved_data["way"].toInt()));
      const torch::Tensor along = given.mul(normed).mean({-1}, /*keepdim=*/true);
      to_input = given.sub_(normed.mul_(along)).mul_(reciprocal).to(input.scalar_type());
    }
    return {to_input, to_weight, torch::Tensor(), torch::Tensor()};
  }
};

extern "C" {

// A new tensor. `weight` may be null, or is as wide as the input's last axis.
int lora_rms_norm(const torch::Tensor *input, const torch::Tensor *weight, double epsilon, int way,
                  torch::Tensor **output) {
  return lora::guarded([&] {
    TORCH_CHECK(input->dim() >= 1 && input->numel() > 0, "RMS normalisation expects numbers along a last axis, not ",
                input->sizes());
    TORCH_CHECK(at::isFloatingType(input->scalar_type()) && input->scalar_type() != at::kDouble,
                "RMS normalisation expects f32, f16 or bf16, not ", input->scalar_type());
    TORCH_CHECK(weight == nullptr || (weight->dim() == 1 && weight->size(0) == input->size(-1)),
                "RMS normalisation of ", input->sizes(), " with a weight of ",
                weight == nullptr ? at::IntArrayRef() : weight->sizes());
    const auto own = weight == nullptr ? std::nullopt : std::optional<torch::Tensor>(*weight);
    *output = new torch::Tensor(RmsNorm::apply(*input, own, epsilon, static_cast<int64_t>(way)));
  });
}

} // extern "C"

} // namespace lora::rms_norm
