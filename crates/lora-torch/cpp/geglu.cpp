// GEGLU, of which only the projection is kept: libtorch would keep the gate's GELU beside it. That is computed again in the
// backward pass, and the gradient is written where it belongs instead of being put together from padded halves. Gradients are
// those of the separate operations to the bit.

#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

#include "guard.h"

namespace lora::geglu {

struct Geglu : torch::autograd::Function<Geglu> {
  static torch::Tensor forward(torch::autograd::AutogradContext *context, const torch::Tensor &projection) {
    context->save_for_backward({projection});
    const auto halves = projection.chunk(2, -1);
    return at::gelu(halves[1]).mul_(halves[0]);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *context,
                                                 torch::autograd::variable_list gradients) {
    const torch::Tensor projection = context->get_saved_variables()[0], &given = gradients[0];
    const auto halves = projection.chunk(2, -1);
    const torch::Tensor gradient = at::empty_like(projection, at::MemoryFormat::Contiguous);
    auto parts = gradient.chunk(2, -1);
    // The second half is where what lies between is until its own turn comes.
    at::gelu_out(parts[1], halves[1]);
    at::mul_out(parts[0], given, parts[1]);
    at::mul_out(parts[1], given, halves[0]);
    at::gelu_backward_out(parts[1], parts[1], halves[1]);
    return {gradient};
  }
};

extern "C" {

// A new tensor, half as wide.
int lora_geglu(const torch::Tensor *projection, torch::Tensor **output) {
  return lora::guarded([&] {
    TORCH_CHECK(projection->dim() >= 1 && projection->size(-1) % 2 == 0, "GEGLU expects an even last axis, not ", projection->sizes());
    *output = new torch::Tensor(Geglu::apply(*projection));
  });
}

} // extern "C"

} // namespace lora::geglu
