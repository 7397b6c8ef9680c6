// Frozen linear layers and convolutions. Of an input nothing but its shape is kept (libtorch's own convolution keeps it for
// a gradient of the weight that nobody asks for), and a weight that is stored in fewer bytes than it computes in is made
// anew in the forward and again in the backward pass. How weights are made whole is in stored.cpp.

#include <ATen/core/ivalue.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>
#include <torch/types.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "guard.h"
#include "stored.h"

namespace lora::frozen {

struct Layer : torch::CustomClassHolder {
  explicit Layer(const LoraStored &raw) : weight(raw) {}

  // Calls `work(weight, start, count)` on each tile.
  template <typename Work>
  void each_tile(at::ScalarType kind, Work &&work) const {
    const Present present(weight);
    const Stored &own = *present;
    // A product reads what is whole already where it is.
    const bool as_it_is = !convolution && own.is_whole(kind);
    const int64_t outputs = own.shape[0], tile = groups > 1 || as_it_is ? outputs : own.tile();
    const Rows rows(own, kind);
    for (int64_t start = 0; start < outputs; start += tile) {
      const int64_t count = std::min(tile, outputs - start);
      work(rows(start, count), start, count);
    }
  }

  // Whether products of tiles go where they belong. On the CPU they are put together: oneDNN is faster on what lies by itself.
  bool in_place(const at::Tensor &tensor) const { return !convolution && !lora::dry::as_on_cpu(tensor); }

  at::Tensor forward(const at::Tensor &input) const {
    std::vector<at::Tensor> parts;
    at::Tensor all;
    each_tile(input.scalar_type(), [&](const at::Tensor &rows, int64_t start, int64_t count) {
      const auto own_bias = bias.defined() ? std::optional<at::Tensor>(bias.narrow(0, start, count)) : std::nullopt;
      if (in_place(input) && count < weight.shape[0]) {
        const at::Tensor of = input.reshape({-1, input.size(-1)});
        if (!all.defined()) all = at::empty({of.size(0), weight.shape[0]}, of.options());
        at::Tensor place = all.narrow(1, start, count);
        if (own_bias) at::addmm_out(place, *own_bias, of, rows.t());
        else at::mm_out(place, of, rows.t());
        return;
      }
      parts.push_back(convolution ? at::conv2d(input, rows, own_bias, stride, padding, 1, groups)
                                  : at::linear(input, rows, own_bias));
    });
    if (all.defined()) {
      std::vector<int64_t> sizes = input.sizes().vec();
      sizes.back() = all.size(1);
      return at::_unsafe_view(all, sizes);
    }
    const at::Tensor output = parts.size() == 1 ? parts[0] : at::cat(parts, convolution ? 1 : -1);
    // A product of several axes comes as a view of one of two; what leaves a function must not be one.
    return output.is_view() ? at::_unsafe_view(output, output.sizes()) : output;
  }

  // Parts of several tiles in half precision are added up in f32. Products that go where they belong are rounded once a
  // tile; of those there are few (seven have twice the error of one), and a sum in f32 would hold three times the memory.
  at::Tensor backward(const at::Tensor &gradient, at::IntArrayRef sizes) const {
    const at::ScalarType kind = gradient.scalar_type();
    const bool half = kind == at::kHalf || kind == at::kBFloat16;
    at::Tensor sum;
    each_tile(kind, [&](const at::Tensor &rows, int64_t start, int64_t count) {
      const at::Tensor own = gradient.narrow(convolution ? 1 : -1, start, count);
      if (sum.defined() && in_place(gradient)) {
        sum.view({-1, sum.size(-1)}).addmm_(own.reshape({-1, count}), rows);
        return;
      }
      at::Tensor part = convolution ? to_input(own, rows, sizes) : own.matmul(rows);
      if (half && count < weight.shape[0] && !in_place(gradient)) part = part.to(at::kFloat);
      sum = sum.defined() ? sum.add_(part) : part;
    });
    return sum.to(kind);
  }

  // The gradient of a convolution's input is the transposed convolution, as large as the input was.
  at::Tensor to_input(const at::Tensor &gradient, const at::Tensor &rows, at::IntArrayRef sizes) const {
    std::vector<int64_t> left;
    for (int axis : {2, 3}) {
      const int64_t least = (gradient.size(axis) - 1) * stride - 2 * padding + rows.size(axis);
      left.push_back(sizes[axis] - least);
    }
    return at::conv_transpose2d(gradient, rows, {}, stride, padding, left, groups, 1);
  }

  Stored weight;
  at::Tensor bias;
  bool convolution = false;
  int64_t stride = 1, padding = 0, groups = 1;
};

struct Frozen : torch::autograd::Function<Frozen> {
  static torch::Tensor forward(torch::autograd::AutogradContext *context, const torch::Tensor &input, c10::IValue capsule) {
    const auto held = capsule.toCapsule();
    context->saved_data["layer"] = capsule;
    context->saved_data["sizes"] = input.sizes().vec();
    return static_cast<Layer *>(held.get())->forward(input);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *context,
                                                 torch::autograd::variable_list gradients) {
    const auto held = context->saved_data["layer"].toCapsule();
    const auto sizes = context->saved_data["sizes"].toIntVector();
    return {static_cast<Layer *>(held.get())->backward(gradients[0], sizes), torch::Tensor()};
  }
};

// The numbers of an input or output as rows of a matrix.
at::Tensor in_rows(const at::Tensor &tensor) { return tensor.reshape({-1, tensor.size(-1)}); }

// A linear layer with a low-rank update, W x + b + scale · up (down x), and its gradients. The update is added as it is
// multiplied, where operations of their own would write it and its part of the input's gradient out and read both again.
struct Adapted : torch::autograd::Function<Adapted> {
  static torch::Tensor forward(torch::autograd::AutogradContext *context, const torch::Tensor &input, const torch::Tensor &down,
                               const torch::Tensor &up, c10::IValue capsule, double scale) {
    const auto held = capsule.toCapsule();
    const at::Tensor rows = in_rows(input);
    at::Tensor output = static_cast<Layer *>(held.get())->forward(rows);
    at::Tensor hidden = rows.mm(down.t());
    if (scale != 1) hidden.mul_(scale);
    output.addmm_(hidden, up.t());
    context->save_for_backward({down, up, hidden});
    context->saved_data["input"] = input;
    context->saved_data["sizes"] = input.sizes().vec();
    context->saved_data["layer"] = capsule;
    context->saved_data["scale"] = scale;
    std::vector<int64_t> sizes = input.sizes().vec();
    sizes.back() = output.size(1);
    return at::_unsafe_view(output, sizes);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *context,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const at::Tensor &down = saved[0], &up = saved[1], &hidden = saved[2];
    const auto held = context->saved_data["layer"].toCapsule();
    const double scale = context->saved_data["scale"].toDouble();
    const at::Tensor rows = in_rows(gradients[0]);
    at::Tensor inner = rows.mm(up), to_input, to_down, to_up;
    if (scale != 1) inner.mul_(scale);
    {
      // Where no other layer reads it, it is gone before its gradient, which is as large, is made.
      at::IValue input;
      std::swap(input, context->saved_data["input"]);
      TORCH_CHECK(input.isTensor(), "the gradients of a layer with a low-rank update are given once");
      if (context->needs_input_grad(1)) to_down = inner.t().mm(in_rows(input.toTensor()));
    }
    if (context->needs_input_grad(2)) to_up = rows.t().mm(hidden);
    if (context->needs_input_grad(0)) {
      to_input = static_cast<Layer *>(held.get())->backward(rows, {});
      // No view, which would hold another tensor: the layer before may write into it.
      to_input = at::_unsafe_view(to_input.addmm_(inner, down), context->saved_data["sizes"].toIntVector());
    }
    return {to_input, to_down, to_up, torch::Tensor(), torch::Tensor()};
  }
};

// The layer as graphs hold it. `bias` may be null.
c10::intrusive_ptr<Layer> layer_of(const LoraStored &weight, const torch::Tensor *bias) {
  auto layer = c10::make_intrusive<Layer>(weight);
  layer->bias = or_none(bias);
  return layer;
}

c10::IValue capsule_of(c10::intrusive_ptr<Layer> layer) {
  return c10::IValue::make_capsule(c10::static_intrusive_pointer_cast<torch::CustomClassHolder>(std::move(layer)));
}

extern "C" {

// The layer's output, a new tensor. `bias` may be null.
int lora_frozen(const torch::Tensor *input, const LoraStored *weight, const torch::Tensor *bias, int convolution, int64_t stride,
                int64_t padding, int64_t groups, torch::Tensor **output) {
  return lora::guarded([&] {
    auto layer = layer_of(*weight, bias);
    layer->convolution = convolution != 0;
    layer->stride = stride;
    layer->padding = padding;
    layer->groups = groups;
    *output = new torch::Tensor(Frozen::apply(*input, capsule_of(std::move(layer))));
  });
}

// The output of a linear layer with `scale · up (down x)` added, a new tensor. `bias` may be null; `down`, `up` and what the
// weight computes in are of the input's type.
int lora_frozen_low_rank(const torch::Tensor *input, const LoraStored *weight, const torch::Tensor *bias,
                         const torch::Tensor *down, const torch::Tensor *up, double scale, torch::Tensor **output) {
  return lora::guarded([&] {
    *output = new torch::Tensor(Adapted::apply(*input, *down, *up, capsule_of(layer_of(*weight, bias)), scale));
  });
}

} // extern "C"

} // namespace lora::frozen
