// Group normalisation followed by SiLU, of which only the input and the statistics are kept: libtorch would keep the
// normalised values too, as large as the input. They are computed again in the backward pass, by the same kernel, so that
// gradients are those of the two operations to the bit.

#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

#include "guard.h"

namespace lora::norm_silu {

struct Shape {
  explicit Shape(const at::Tensor &input) : items(input.size(0)), channels(input.size(1)), pixels(input.numel() / (items * channels)) {}
  int64_t items, channels, pixels;
};

struct NormSilu : torch::autograd::Function<NormSilu> {
  static torch::Tensor forward(torch::autograd::AutogradContext *context, const torch::Tensor &given, const torch::Tensor &weight,
                               const torch::Tensor &bias, int64_t groups, double epsilon) {
    const torch::Tensor input = given.contiguous();
    const Shape shape(input);
    auto [normed, mean, factor] =
        at::native_group_norm(input, weight, bias, shape.items, shape.channels, shape.pixels, groups, epsilon);
    context->save_for_backward({input, weight, bias, mean, factor});
    context->saved_data["groups"] = groups;
    context->saved_data["epsilon"] = epsilon;
    return at::silu_(normed);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *context,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const torch::Tensor &input = saved[0], &weight = saved[1], &bias = saved[2], &mean = saved[3], &factor = saved[4];
    const int64_t groups = context->saved_data["groups"].toInt();
    const Shape shape(input);
    torch::Tensor gradient;
    {
      const torch::Tensor normed = std::get<0>(at::native_group_norm(input, weight, bias, shape.items, shape.channels, shape.pixels,
                                                                     groups, context->saved_data["epsilon"].toDouble()));
      gradient = at::silu_backward(gradients[0].contiguous(), normed);
    }
    const auto needs = [&](size_t index) { return context->needs_input_grad(index); };
    auto [to_input, to_weight, to_bias] =
        at::native_group_norm_backward(gradient, input, mean, factor, weight, shape.items, shape.channels, shape.pixels, groups,
                                       {needs(0), needs(1), needs(2)});
    return {to_input, to_weight, to_bias, torch::Tensor(), torch::Tensor()};
  }
};

extern "C" {

// A new tensor. The input has at least one element.
int lora_norm_silu(const torch::Tensor *input, const torch::Tensor *weight, const torch::Tensor *bias, int64_t groups,
                   double epsilon, torch::Tensor **output) {
  return lora::guarded([&] {
    TORCH_CHECK(input->dim() >= 2 && input->numel() > 0 && groups > 0 && input->size(1) % groups == 0,
                "normalisation in ", groups, " groups expects [items, channels, ...] with channels that divide into them, not ",
                input->sizes());
    *output = new torch::Tensor(NormSilu::apply(*input, *weight, *bias, groups, epsilon));
  });
}

} // extern "C"

} // namespace lora::norm_silu
