// Rotary position embedding (Su et al., "RoFormer", 2021): pairs of numbers of a head are turned by angles that grow
// with the position. Nothing of the input's size is kept or made on the side, as the gradient is turned back by the
// same angles; tables of cosines and sines, which other programs' layers cast each, are kept as they were given.

#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

#include "guard.h"

namespace lora::rotary {

struct Pairs {
  torch::Tensor first, second;
};

// What is turned of `[…, width]`: the first `turned` numbers, as two halves or as neighbours.
Pairs pairs_of(const torch::Tensor &tensor, int64_t turned, bool neighbours) {
  const torch::Tensor own = tensor.narrow(-1, 0, turned);
  if (neighbours) return {own.slice(-1, 0, turned, 2), own.slice(-1, 1, turned, 2)};
  return {own.narrow(-1, 0, turned / 2), own.narrow(-1, turned / 2, turned / 2)};
}

// Turned by the angles, or with `direction` -1 back. Where cosines and sines carry a factor this is the transposed map.
torch::Tensor turned(const torch::Tensor &input, const torch::Tensor &cos, const torch::Tensor &sin, bool neighbours,
                     int direction) {
  const int64_t width = input.size(-1), turned = 2 * cos.size(-1);
  const torch::Tensor c = cos.to(input.scalar_type()).unsqueeze(1), s = sin.to(input.scalar_type()).unsqueeze(1);
  const torch::Tensor output = at::empty_like(input);
  const Pairs from = pairs_of(input, turned, neighbours);
  Pairs to = pairs_of(output, turned, neighbours);
  at::mul_out(to.first, from.first, c);
  to.first.addcmul_(from.second, s, -direction);
  at::mul_out(to.second, from.second, c);
  to.second.addcmul_(from.first, s, direction);
  if (turned < width) output.narrow(-1, turned, width - turned).copy_(input.narrow(-1, turned, width - turned));
  return output;
}

struct Rotary : torch::autograd::Function<Rotary> {
  static torch::Tensor forward(torch::autograd::AutogradContext *context, const torch::Tensor &input,
                               const torch::Tensor &cos, const torch::Tensor &sin, bool neighbours) {
    context->save_for_backward({cos, sin});
    context->saved_data["neighbours"] = neighbours;
    return turned(input, cos, sin, neighbours, 1);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *context,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const bool neighbours = context->saved_data["neighbours"].toBool();
    return {turned(gradients[0], saved[0], saved[1], neighbours, -1), torch::Tensor(), torch::Tensor(),
            torch::Tensor()};
  }
};

extern "C" {

// A new tensor. Sizes: src/rotary.rs.
int lora_rotary(const torch::Tensor *input, const torch::Tensor *cos, const torch::Tensor *sin, int neighbours,
                torch::Tensor **output) {
  return lora::guarded([&] {
    TORCH_CHECK(
        input->dim() == 4 && cos->dim() == 3 && cos->sizes() == sin->sizes() && cos->size(1) == input->size(2) &&
            (cos->size(0) == 1 || cos->size(0) == input->size(0)) && 2 * cos->size(2) <= input->size(3),
        "rotary embedding of ", input->sizes(), " by cosines of ", cos->sizes(), " and sines of ", sin->sizes());
    *output = new torch::Tensor(Rotary::apply(*input, *cos, *sin, neighbours != 0));
  });
}

} // extern "C"

} // namespace lora::rotary
