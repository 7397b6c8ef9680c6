// Gradient checkpointing (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016): a part of a network whose
// activations are not kept but computed again in the backward pass. The part itself is a callback into Rust.

#include <ATen/core/ivalue.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/custom_class.h>
#include <torch/types.h>

#include <stdexcept>
#include <vector>

#include "guard.h"
#include "dry/dry.h"

namespace lora::checkpoint {

// Computes the part: gives a new tensor, or null with a text that stays until this thread's next call.
using Run = torch::Tensor *(*)(void *part, torch::Tensor **inputs, size_t count, const char **error);
using Drop = void (*)(void *part);

// Owns the Rust side of a part for as long as the graph may need it.
struct Part : torch::CustomClassHolder {
  Part(void *data, Run run, Drop drop) : data(data), run(run), drop(drop) {}
  ~Part() override { drop(data); }

  torch::Tensor operator()(std::vector<torch::Tensor> &inputs) const {
    std::vector<torch::Tensor *> pointers;
    pointers.reserve(inputs.size());
    for (auto &input : inputs) pointers.push_back(&input);
    const char *error = nullptr;
    torch::Tensor *output = run(data, pointers.data(), pointers.size(), &error);
    if (output == nullptr) throw std::runtime_error(error ? error : "a checkpointed part failed");
    torch::Tensor result = *output;
    delete output;
    return result;
  }

  void *data;
  Run run;
  Drop drop;
};

// A copy in host memory, pinned for a device, on its way while the next kernels are launched.
torch::Tensor to_host(const torch::Tensor &tensor) {
  if (lora::dry::is_dry(tensor)) {
    const lora::dry::OnHost there;
    return at::empty_like(tensor);
  }
  const auto options = tensor.options().device(at::kCPU).pinned_memory(!tensor.is_cpu());
  return torch::empty_like(tensor, options).copy_(tensor, /*non_blocking=*/true);
}

struct Checkpoint : torch::autograd::Function<Checkpoint> {
  // `anchor` requires a gradient and gets none: it puts the part into the graph even where only its parameters are trained.
  static torch::Tensor forward(torch::autograd::AutogradContext *context, const torch::Tensor &anchor,
                               at::TensorList inputs, c10::IValue part, int64_t host_from) {
    (void)anchor;
    context->saved_data["part"] = part;
    std::vector<torch::Tensor> plain(inputs.begin(), inputs.end()), kept = plain;
    c10::List<bool> wanted;
    for (torch::Tensor &input : kept) {
      wanted.push_back(input.requires_grad());
      if (static_cast<int64_t>(input.nbytes()) >= host_from) input = to_host(input);
    }
    context->saved_data["wanted"] = wanted;
    context->saved_data["host_from"] = host_from;
    context->save_for_backward(kept);
    const torch::Tensor output = (*static_cast<Part *>(part.toCapsule().get()))(plain);
    // What leaves a function must not be a view, which in-place operations outside could not follow.
    return output.is_view() ? at::_unsafe_view(output, output.sizes()) : output;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *context,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const auto part = context->saved_data["part"].toCapsule();
    std::vector<torch::Tensor> inputs;
    inputs.reserve(saved.size());
    const auto wanted = context->saved_data["wanted"].toBoolList();
    const int64_t host_from = context->saved_data["host_from"].toInt();
    for (size_t i = 0; i < saved.size(); ++i) {
      torch::Tensor input = saved[i].detach();
      if (static_cast<int64_t>(input.nbytes()) >= host_from) input = lora::dry::from_host(input, gradients[0].device());
      inputs.push_back(input.detach().set_requires_grad(wanted[i]));
    }
    {
      torch::AutoGradMode on(true);
      torch::Tensor output = (*static_cast<Part *>(part.get()))(inputs);
      // Parameters of the part get their gradients here, inputs below. Nothing reads the output's numbers.
      if (output.requires_grad()) {
        const torch::autograd::edge_list roots{torch::autograd::impl::gradient_edge(output)};
        output.reset();
        auto &engine = torch::autograd::Engine::get_default_engine();
        engine.execute(roots, {gradients[0]}, /*keep_graph=*/false, /*create_graph=*/false, /*accumulate_grad=*/true);
      }
    }
    torch::autograd::variable_list result;
    result.push_back(torch::Tensor());
    for (auto &input : inputs) result.push_back(input.requires_grad() ? input.grad() : torch::Tensor());
    result.insert(result.end(), 2, torch::Tensor());
    return result;
  }
};

extern "C" {

// Takes over `part`, whatever happens. Inputs of `host_from` bytes and more wait in host memory. The output is a new tensor.
int lora_checkpoint(void *part, Run run, Drop drop, torch::Tensor **inputs, size_t count, int64_t host_from,
                    torch::Tensor **output) {
  return lora::guarded([&] {
    auto holder = c10::make_intrusive<Part>(part, run, drop);
    torch::autograd::variable_list list;
    for (size_t i = 0; i < count; ++i) list.push_back(*inputs[i]);
    torch::Tensor anchor = torch::empty({0}).set_requires_grad(true);
    auto capsule = c10::IValue::make_capsule(c10::static_intrusive_pointer_cast<torch::CustomClassHolder>(holder));
    *output = new torch::Tensor(Checkpoint::apply(anchor, at::TensorList(list), capsule, host_from));
  });
}

} // extern "C"

} // namespace lora::checkpoint
