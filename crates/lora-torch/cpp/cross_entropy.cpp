// Cross entropy of a frozen linear head, without logits `[tokens, words]` ever being there as a whole: tokens come in
// chunks, and the gradient of a chunk's hidden states is computed beside its losses, while its logits are there. The
// backward pass multiplies.

#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "guard.h"
#include "stored.h"

namespace lora::cross_entropy {

using at::Tensor;

// What a chunk's logits and what is made of them may take, in bytes; also what a head may take that is made whole once
// a call. Larger ones are made whole in parts, for each chunk anew.
constexpr int64_t MOST = 128 << 20;
// Numbers of such a part.
constexpr int64_t PART = 1 << 22;
// Gradients of logits in f16 are multiplied by this on their way to the hidden states: probabilities go down to 1e-8.
constexpr double LIFT = 1024;

struct Options {
  double smoothing, cap, scale; // no cap: 0
};

// A head's products, in parts of its outputs where it is not there as a whole.
class Head {
public:
  Head(const Stored &stored, at::ScalarType kind) : present(stored), own(*present), rows(own, kind), kind(kind) {
    const int64_t bytes = words() * own.row * static_cast<int64_t>(at::elementSize(kind));
    if (own.is_whole(kind) || bytes <= MOST) whole = rows(0, words());
    part = whole.defined() ? words() : tile_of(words(), own.row, PART);
  }

  int64_t words() const { return own.shape[0]; }

  // Logits in f32, new ones: products are rounded to the type that the head computes in, as those of a layer are.
  Tensor logits(const Tensor &hidden) const {
    const Tensor all = at::empty({hidden.size(0), words()}, hidden.options().dtype(at::kFloat));
    each([&](const Tensor &weight, int64_t start, int64_t count) {
      Tensor place = all.narrow(1, start, count);
      if (kind == at::kFloat) at::mm_out(place, hidden, weight.t());
      else place.copy_(hidden.mm(weight.t()));
    });
    return all;
  }

  // The hidden states' gradient of that of the logits: in the head's type, or in f32 where it is added up.
  Tensor backward(const Tensor &logits) const {
    Tensor sum;
    each([&](const Tensor &weight, int64_t start, int64_t count) {
      const Tensor product = logits.narrow(1, start, count).to(kind).mm(weight);
      if (whole.defined()) sum = product;
      else if (!sum.defined()) sum = product.to(at::kFloat);
      else sum.add_(product.to(at::kFloat));
    });
    return sum;
  }

private:
  template <typename Work>
  void each(Work &&work) const {
    for (int64_t start = 0; start < words(); start += part) {
      const int64_t count = std::min(part, words() - start);
      work(whole.defined() ? whole : rows(start, count), start, count);
    }
  }

  const Present present;
  const Stored &own;
  const Rows rows;
  const at::ScalarType kind;
  Tensor whole;
  int64_t part;
};

// A chunk's losses, `[tokens, 1]`, and into `gradient`, where there is one, that of their sum. `counted` is what each
// loss is multiplied by.
Tensor losses_of(const Head &head, const Options &options, const Tensor &hidden, const Tensor &labels,
                 const Tensor &counted, const Tensor &gradient) {
  const auto [smoothing, cap, scale] = options;
  Tensor own = head.logits(hidden);
  if (cap > 0) own.mul_(scale / cap).tanh_().mul_(cap);
  else if (scale != 1) own.mul_(scale);
  const Tensor place = labels.clamp_min(0).unsqueeze(1);
  Tensor losses = own.gather(1, place).mul_(smoothing - 1);
  if (smoothing > 0) losses.sub_(own.mean({1}, true).mul_(smoothing));
  Tensor slope;
  if (cap > 0 && gradient.defined()) slope = own.square().div_(-cap * cap).add_(1);
  const Tensor most = own.amax({1}, true);
  own.sub_(most).exp_();
  const Tensor sum = own.sum({1}, true);
  losses.add_(sum.log()).add_(most).masked_fill_(counted.eq(0), 0).mul_(counted);
  if (!gradient.defined()) return losses;

  // Probabilities less what they were to be.
  own.div_(sum);
  if (smoothing > 0) own.sub_(smoothing / static_cast<double>(head.words()));
  own.scatter_add_(1, place, at::full_like(sum, smoothing - 1));
  if (slope.defined()) own.mul_(slope);
  const double lift = hidden.scalar_type() == at::kHalf ? LIFT : 1;
  own.mul_(counted.mul(scale * lift));
  const Tensor product = head.backward(own);
  gradient.copy_(lift == 1 ? product : product.to(at::kFloat).div_(lift));
  return losses;
}

// Tokens of a chunk.
int64_t chunk_of(const Tensor &hidden, int64_t words, const Options &options, bool wants) {
  const bool half = hidden.scalar_type() != at::kFloat, slope = wants && options.cap > 0;
  return std::max<int64_t>(1, MOST / (words * (4 + 2 * half + 4 * slope)));
}

// The losses of all tokens, `[tokens, 1]`; `gradient` as above.
Tensor all_losses(const Stored &stored, const Options &options, const Tensor &hidden, const Tensor &labels,
                  const std::optional<Tensor> &weights, const Tensor &gradient) {
  const Head head(stored, hidden.scalar_type());
  const int64_t tokens = hidden.size(0), chunk = chunk_of(hidden, head.words(), options, gradient.defined());
  Tensor counted = labels.ge(0).to(at::kFloat);
  if (weights) counted.mul_(*weights);
  counted = counted.unsqueeze(1);
  const Tensor losses = at::empty({tokens, 1}, hidden.options().dtype(at::kFloat));
  for (int64_t start = 0; start < tokens; start += chunk) {
    const int64_t count = std::min(chunk, tokens - start);
    const auto part = [&](const Tensor &all) { return all.defined() ? all.narrow(0, start, count) : Tensor(); };
    part(losses).copy_(losses_of(head, options, part(hidden), part(labels), part(counted), part(gradient)));
  }
  return losses;
}

// The sum of the losses, or the loss of each token: a token's depends on its own hidden states alone, so that the kept
// gradient of the sum serves both.
struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  static Tensor forward(torch::autograd::AutogradContext *context, const Tensor &hidden, const Tensor &labels,
                        const std::optional<Tensor> &weights, const Stored *stored, const Options *options,
                        bool sums, bool wants) {
    const Tensor rows = hidden.reshape({-1, hidden.size(-1)}).contiguous();
    const Tensor gradient = wants ? at::empty_like(rows) : Tensor();
    const auto each = weights ? std::optional<Tensor>(weights->reshape(-1)) : std::nullopt;
    const Tensor losses = all_losses(*stored, *options, rows, labels.reshape(-1), each, gradient);
    if (wants) context->saved_data["gradient"] = gradient.view(hidden.sizes());
    return sums ? losses.sum() : losses.view(labels.sizes());
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *context,
                                                 torch::autograd::variable_list gradients) {
    at::IValue &held = context->saved_data["gradient"];
    TORCH_CHECK(held.isTensor(), "the gradient of a cross entropy is given once");
    Tensor own = held.toTensor();
    held = at::IValue();
    const bool sums = gradients[0].dim() == 0;
    const Tensor given = sums ? gradients[0].reshape(std::vector<int64_t>(own.dim(), 1)) : gradients[0].unsqueeze(-1);
    // A factor that scales losses up may be too large for f16.
    if (own.scalar_type() == at::kHalf) at::mul_out(own, own, given);
    else own.mul_(given.to(own.scalar_type()));
    torch::autograd::variable_list result(7);
    result[0] = own;
    return result;
  }
};

void check(const Tensor &hidden, const Tensor &labels, const Tensor *weights, const Stored &stored,
           const Options &options) {
  TORCH_CHECK(stored.shape.size() == 2 && hidden.dim() >= 1 && hidden.size(-1) == stored.row,
              "cross entropy of hidden states ", hidden.sizes(), " by a head ", at::IntArrayRef(stored.shape));
  const auto of_tokens = hidden.sizes().slice(0, hidden.dim() - 1);
  TORCH_CHECK(labels.sizes() == of_tokens && labels.scalar_type() == at::kLong, "cross entropy of hidden states ",
              hidden.sizes(), " expects whole numbers ", of_tokens, " as labels, not ", labels.sizes(), " of ",
              labels.scalar_type());
  TORCH_CHECK(weights == nullptr || weights->sizes() == of_tokens, "cross entropy of hidden states ", hidden.sizes(),
              " expects weights ", of_tokens);
  TORCH_CHECK(options.smoothing >= 0 && options.smoothing < 1 && options.cap >= 0, "a label smoothing of ",
              options.smoothing, " or a soft cap of ", options.cap);
}

extern "C" {

// The sum of all losses, a new tensor without axes, or the loss of each token, of the labels' shape; in f32. `weights`
// may be null, and no cap is 0.
int lora_cross_entropy(const Tensor *hidden, const LoraStored *head, const Tensor *labels, const Tensor *weights,
                       double smoothing, double cap, double scale, bool sums, Tensor **output) {
  return lora::guarded([&] {
    const Stored stored(*head);
    const Options options{smoothing, cap, scale};
    check(*hidden, *labels, weights, stored, options);
    const bool wants = at::GradMode::is_enabled() && hidden->requires_grad();
    const auto each = weights == nullptr ? std::nullopt : std::optional<Tensor>(*weights);
    *output = new Tensor(CrossEntropy::apply(*hidden, *labels, each, &stored, &options, sums, wants));
  });
}

} // extern "C"

} // namespace lora::cross_entropy
