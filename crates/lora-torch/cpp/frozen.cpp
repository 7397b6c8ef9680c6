// Frozen linear layers and convolutions whose weights are stored in fewer bytes than they compute in. The weight is made
// anew in the forward and again in the backward pass, which needs neither the input nor the whole weight in between.

#include <ATen/core/ivalue.h>
#include <torch/custom_class.h>
#include <torch/torch.h>

#include <string>
#include <vector>

namespace {

thread_local std::string last_error;

struct Weight : torch::CustomClassHolder {
  torch::Tensor stored, scale, bias;
  bool convolution = false;
  int64_t stride = 1, padding = 0, groups = 1;

  torch::Tensor dequantised(at::ScalarType kind) const {
    torch::Tensor weight = stored.to(kind);
    return scale.defined() ? weight.mul_(scale.to(kind)) : weight;
  }
};

const Weight &weight_of(const c10::intrusive_ptr<torch::CustomClassHolder> &capsule) {
  return *static_cast<Weight *>(capsule.get());
}

struct Frozen : torch::autograd::Function<Frozen> {
  static torch::Tensor forward(torch::autograd::AutogradContext *context, const torch::Tensor &input, c10::IValue capsule) {
    const auto held = capsule.toCapsule();
    const Weight &own = weight_of(held);
    context->saved_data["weight"] = capsule;
    context->saved_data["sizes"] = input.sizes().vec();
    const torch::Tensor weight = own.dequantised(input.scalar_type());
    const auto bias = own.bias.defined() ? std::optional<torch::Tensor>(own.bias) : std::nullopt;
    if (!own.convolution) {
      // A product of several axes comes as a view of one of two; what leaves a function must not be one.
      const torch::Tensor output = at::linear(input, weight, bias);
      return output.is_view() ? at::_unsafe_view(output, output.sizes()) : output;
    }
    return at::conv2d(input, weight, bias, own.stride, own.padding, 1, own.groups);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *context,
                                                 torch::autograd::variable_list gradients) {
    const auto held = context->saved_data["weight"].toCapsule();
    const Weight &own = weight_of(held);
    const torch::Tensor &gradient = gradients[0];
    const torch::Tensor weight = own.dequantised(gradient.scalar_type());
    if (!own.convolution) return {gradient.matmul(weight), torch::Tensor()};
    const auto sizes = context->saved_data["sizes"].toIntVector();
    std::vector<int64_t> left;
    for (int axis : {2, 3}) {
      const int64_t least = (gradient.size(axis) - 1) * own.stride - 2 * own.padding + weight.size(axis);
      left.push_back(sizes[axis] - least);
    }
    return {at::conv_transpose2d(gradient, weight, {}, own.stride, own.padding, left, own.groups, 1), torch::Tensor()};
  }
};

} // namespace

extern "C" {

const char *lora_frozen_last_error() { return last_error.c_str(); }

// `scale` and `bias` may be null. The output is a new tensor; null on failure.
torch::Tensor *lora_frozen(torch::Tensor *input, torch::Tensor *stored, torch::Tensor *scale, torch::Tensor *bias,
                           int convolution, int64_t stride, int64_t padding, int64_t groups) {
  try {
    auto weight = c10::make_intrusive<Weight>();
    weight->stored = *stored;
    if (scale != nullptr) weight->scale = *scale;
    if (bias != nullptr) weight->bias = *bias;
    weight->convolution = convolution != 0;
    weight->stride = stride;
    weight->padding = padding;
    weight->groups = groups;
    auto capsule = c10::IValue::make_capsule(c10::static_intrusive_pointer_cast<torch::CustomClassHolder>(weight));
    return new torch::Tensor(Frozen::apply(*input, capsule));
  } catch (const c10::Error &error) {
    last_error = error.what_without_backtrace();
  } catch (const std::exception &error) {
    last_error = error.what();
  } catch (...) {
    last_error = "unknown C++ exception";
  }
  return nullptr;
}

} // extern "C"
