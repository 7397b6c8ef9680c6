// A gated activation, act(gate) · up (Shazeer, "GLU Variants Improve Transformer", 2020), of which only gate and up are
// kept: libtorch would keep the activated gate beside them. That is computed again in the backward pass. Gradients are
// those of the separate operations to the bit. Where gate and up are halves of one projection: geglu.cpp.

#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

#include "guard.h"

namespace lora::gated {

// In the order of `Gate` in src/activation.rs.
enum Act : int64_t { SILU, GELU, GELU_TANH };

torch::Tensor activated(const torch::Tensor &gate, int64_t act) {
  return act == SILU ? at::silu(gate) : at::gelu(gate, act == GELU ? "none" : "tanh");
}

// Makes of the activated gate's gradient the gate's, in place.
void through(torch::Tensor &gradient, const torch::Tensor &gate, int64_t act) {
  if (act == SILU) at::silu_backward_out(gradient, gradient, gate);
  else at::gelu_backward_out(gradient, gradient, gate, act == GELU ? "none" : "tanh");
}

// Whether nobody else reads a gradient that was given, so that another may take its place: libtorch holds it once, and this
// function's arguments once more.
bool is_ours(const torch::Tensor &given) {
  return given.use_count() <= 2 && given.storage().use_count() == 1 && given.is_non_overlapping_and_dense() &&
         !given.requires_grad();
}

struct Gated : torch::autograd::Function<Gated> {
  static torch::Tensor forward(torch::autograd::AutogradContext *context, const torch::Tensor &gate,
                               const torch::Tensor &up, int64_t act) {
    context->save_for_backward({gate, up});
    context->saved_data["act"] = act;
    return activated(gate, act).mul_(up);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *context,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const torch::Tensor &gate = saved[0], &up = saved[1];
    torch::Tensor &given = gradients[0];
    const int64_t act = context->saved_data["act"].toInt();
    torch::Tensor to_gate, to_up;
    if (context->needs_input_grad(1)) to_up = activated(gate, act).mul_(given);
    if (context->needs_input_grad(0)) {
      to_gate = is_ours(given) ? given.mul_(up) : given.mul(up);
      through(to_gate, gate, act);
    }
    return {to_gate, to_up, torch::Tensor()};
  }
};

extern "C" {

// A new tensor.
int lora_gated(const torch::Tensor *gate, const torch::Tensor *up, int act, torch::Tensor **output) {
  return lora::guarded([&] {
    TORCH_CHECK(gate->sizes() == up->sizes() && gate->scalar_type() == up->scalar_type(), "a gate of ", gate->sizes(),
                " ", gate->scalar_type(), " on ", up->sizes(), " ", up->scalar_type());
    *output = new torch::Tensor(Gated::apply(*gate, *up, static_cast<int64_t>(act)));
  });
}

} // extern "C"

} // namespace lora::gated
