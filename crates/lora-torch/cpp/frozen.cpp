// Frozen linear layers and convolutions. Of an input nothing but its shape is kept (libtorch's own convolution keeps it for
// a gradient of the weight that nobody asks for), and a weight that is stored in fewer bytes than it computes in is made
// anew in the forward and again in the backward pass. How NF4 is made is in nf4.cpp.

#include <ATen/core/ivalue.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>
#include <torch/types.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "guard.h"
#include "kernels.h"
#include "nf4.h"
#include "staging.h"
#include "dry/dry.h"

extern "C" {

// A weight as Rust holds it. `absmax` and what follows it are there for NF4, `scale` for 8 bits, all may be null. With
// `staging`, the tensors are in host memory, and the weight of that number there.
struct LoraStored {
  const torch::Tensor *values, *scale, *absmax, *nested, *offset;
  const int64_t *shape;
  size_t axes;
  int portable;
  const void *staging;
  int64_t staged;
};

} // extern "C"

namespace {

// On the CPU large weights are worked on in tiles of about this many numbers, 8 MiB in f32: what is as large as some weights
// (118 MiB) would come from the kernel anew each time, and its page faults cost more than all arithmetic of dequantising. Of
// an f32 weight in one piece oneDNN makes such a copy itself.
constexpr int64_t TILE = 1 << 21;

// Outputs of a tile, each of `row` numbers; all of them where one tile is enough.
int64_t tile_of(int64_t outputs, int64_t row) {
  if (row * outputs <= TILE) return outputs;
  // A tile of NF4 begins a block, and oneDNN fills channels up to sixteen.
  const int64_t whole = std::lcm(lora::nf4::BLOCK / std::gcd(lora::nf4::BLOCK, row), int64_t(16));
  return std::min(outputs, std::max(whole, TILE / row / whole * whole));
}

at::Tensor or_none(const torch::Tensor *tensor) { return tensor == nullptr ? at::Tensor() : *tensor; }

struct Stored {
  explicit Stored(const LoraStored &raw)
      : values(*raw.values), scale(or_none(raw.scale)), nf4{values, or_none(raw.absmax), or_none(raw.nested), or_none(raw.offset)},
        shape(raw.shape, raw.shape + raw.axes), portable(raw.portable != 0), id(raw.staged) {
    TORCH_CHECK(raw.axes >= 1, "a weight has a shape");
    for (size_t axis = 1; axis < raw.axes; ++axis) row *= shape[axis];
    if (raw.staging != nullptr) staging = *static_cast<const std::shared_ptr<lora::Staging> *>(raw.staging);
  }

  bool is_nf4() const { return nf4.absmax.defined(); }

  int64_t tile() const { return lora::dry::as_on_cpu(values) ? tile_of(shape[0], row) : shape[0]; }

  at::Tensor values, scale;
  lora::nf4::Quantised nf4;
  std::vector<int64_t> shape;
  // Numbers of one output.
  int64_t row = 1;
  bool portable;
  // Where it passes through on its way to the device, if it does.
  std::shared_ptr<lora::Staging> staging;
  int64_t id;
};

// A weight where it computes, for as long as this lives.
class Present {
public:
  explicit Present(const Stored &own) : weight(own) {
    if (!own.staging) return;
    lease.emplace(own.staging, own.id);
    const auto &parts = lease->parts;
    weight.values = parts[0];
    weight.scale = parts[1];
    weight.nf4 = {parts[0], parts[2], parts[3], parts[4]};
  }

  const Stored &operator*() const { return weight; }

private:
  Stored weight;
  std::optional<lora::Lease> lease;
};

// A weight while it is being made, rows of it or all.
class Rows {
public:
  Rows(const Stored &own, at::ScalarType kind) : own(own), kind(kind) {
    if (own.is_nf4() && !lora::nf4::by_kernel(own.nf4, own.portable)) most = lora::nf4::magnitudes(own.nf4);
  }

  at::Tensor operator()(int64_t start, int64_t count) const {
    if (own.is_nf4()) {
      std::vector<int64_t> shape = own.shape;
      shape[0] = count;
      return lora::nf4::dequantise(own.nf4, most, start * own.row, count * own.row, kind, own.portable).view(shape);
    }
    const at::Tensor stored = own.values.narrow(0, start, count);
    if (own.scale.defined() && lora::dry::as_on_cuda(stored)) return at::empty(stored.sizes(), stored.options().dtype(kind));
    const lora::Kernels *kernels = own.scale.defined() && stored.is_cuda() ? lora::kernels.load() : nullptr;
    // It reads eight numbers at once.
    if (kernels != nullptr && stored.is_contiguous() && start * own.row % 8 == 0) {
      const at::Tensor rows = at::empty(stored.sizes(), stored.options().dtype(kind));
      const float *scale = own.scale.const_data_ptr<float>() + start;
      const bool fp8 = stored.scalar_type() == at::kFloat8_e4m3fn;
      if (lora::done(kernels->scaled(stored.const_data_ptr(), fp8, scale, own.row, stored.numel(), static_cast<int>(kind),
                                     rows.get_device(), rows.mutable_data_ptr()))) {
        return rows;
      }
    }
    const at::Tensor rows = stored.to(kind);
    // With a factor the values are of 8 bits, so that these are a copy.
    return own.scale.defined() ? rows.mul_(own.scale.narrow(0, start, count).to(kind)) : rows;
  }

private:
  const Stored &own;
  at::ScalarType kind;
  at::Tensor most;
};

struct Layer : torch::CustomClassHolder {
  explicit Layer(const LoraStored &raw) : weight(raw) {}

  // Calls `work(weight, start, count)` on each tile.
  template <typename Work>
  void each_tile(at::ScalarType kind, Work &&work) const {
    const Present present(weight);
    const Stored &own = *present;
    // A product reads what is whole already where it is.
    const bool as_it_is = !convolution && own.values.scalar_type() == kind && !own.scale.defined();
    const int64_t outputs = own.shape[0], tile = groups > 1 || as_it_is ? outputs : own.tile();
    const Rows rows(own, kind);
    for (int64_t start = 0; start < outputs; start += tile) {
      const int64_t count = std::min(tile, outputs - start);
      work(rows(start, count), start, count);
    }
  }

  at::Tensor forward(const at::Tensor &input) const {
    std::vector<at::Tensor> parts;
    each_tile(input.scalar_type(), [&](const at::Tensor &rows, int64_t start, int64_t count) {
      const auto own_bias = bias.defined() ? std::optional<at::Tensor>(bias.narrow(0, start, count)) : std::nullopt;
      parts.push_back(convolution ? at::conv2d(input, rows, own_bias, stride, padding, 1, groups)
                                  : at::linear(input, rows, own_bias));
    });
    const at::Tensor output = parts.size() == 1 ? parts[0] : at::cat(parts, convolution ? 1 : -1);
    // A product of several axes comes as a view of one of two; what leaves a function must not be one.
    return output.is_view() ? at::_unsafe_view(output, output.sizes()) : output;
  }

  at::Tensor backward(const at::Tensor &gradient, at::IntArrayRef sizes) const {
    at::Tensor sum;
    each_tile(gradient.scalar_type(), [&](const at::Tensor &rows, int64_t start, int64_t count) {
      const at::Tensor own = gradient.narrow(convolution ? 1 : -1, start, count);
      const at::Tensor part = convolution ? to_input(own, rows, sizes) : own.matmul(rows);
      sum = sum.defined() ? sum.add_(part) : part;
    });
    return sum;
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
    context->save_for_backward({input, down, up, hidden});
    context->saved_data["layer"] = capsule;
    context->saved_data["scale"] = scale;
    std::vector<int64_t> sizes = input.sizes().vec();
    sizes.back() = output.size(1);
    return at::_unsafe_view(output, sizes);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *context,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const at::Tensor &input = saved[0], &down = saved[1], &up = saved[2], &hidden = saved[3];
    const auto held = context->saved_data["layer"].toCapsule();
    const double scale = context->saved_data["scale"].toDouble();
    const at::Tensor rows = in_rows(gradients[0]);
    at::Tensor inner = rows.mm(up), to_input, to_down, to_up;
    if (scale != 1) inner.mul_(scale);
    if (context->needs_input_grad(1)) to_down = inner.t().mm(in_rows(input));
    if (context->needs_input_grad(2)) to_up = rows.t().mm(hidden);
    if (context->needs_input_grad(0)) {
      to_input = static_cast<Layer *>(held.get())->backward(rows, {});
      to_input = to_input.addmm_(inner, down).view(input.sizes());
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

} // namespace

extern "C" {

// What is made whole on CUDA is made so by these from now on; they stay.
void lora_kernels(const lora::Kernels *kernels) { lora::kernels.store(kernels); }

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

// The whole weight, a new tensor in `kind`.
int lora_frozen_whole(const LoraStored *weight, int kind, torch::Tensor **output) {
  return lora::guarded([&] {
    const torch::NoGradGuard no_grad;
    const Stored own(*weight);
    const Present present(own);
    const at::Tensor whole = Rows(*present, static_cast<at::ScalarType>(kind))(0, own.shape[0]);
    // What is in the ring will be written over.
    *output = new torch::Tensor(own.staging ? whole.clone() : whole);
  });
}

} // extern "C"
