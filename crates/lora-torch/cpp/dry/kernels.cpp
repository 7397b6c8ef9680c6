// Meta kernels that libtorch has in Python only. Each makes outputs of the size, type and order of the real kernel's, and takes
// for its time what that one takes on the side, which is said here and nowhere else.

#include "dry.h"

#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>
#include <ATen/WrapDimUtilsMulti.h>
#include <ATen/cpu/Utils.h>
#include <torch/library.h>

namespace lora::dry::kernels {

using at::IntArrayRef;
using at::Tensor;
using at::ScalarType;
using std::optional;

Tensor bytes(int64_t count) { return at::empty({count}, at::TensorOptions(at::kByte).device(at::kMeta)); }
Tensor make(IntArrayRef sizes, const Tensor &like, optional<ScalarType> kind = {}) {
  return at::empty(sizes, like.options().dtype(kind.value_or(like.scalar_type())));
}
ScalarType single(ScalarType kind) { return kind == at::kDouble ? at::kDouble : at::kFloat; }

// ---- convolution

int64_t side(IntArrayRef of, size_t axis) { return of.size() == 1 ? of[0] : of[axis]; }

at::MemoryFormat format_of(const Tensor &input, const Tensor &weight) {
  if (input.dim() != 4) return at::MemoryFormat::Contiguous;
  const auto last = at::MemoryFormat::ChannelsLast;
  return input.suggest_memory_format() == last || weight.suggest_memory_format() == last ? last : at::MemoryFormat::Contiguous;
}

// oneDNN's convolutions work on blocks of so many channels.
constexpr int64_t BLOCKED_CHANNELS = 16;
int64_t whole_blocks(int64_t channels) { return (channels + BLOCKED_CHANNELS - 1) / BLOCKED_CHANNELS * BLOCKED_CHANNELS; }
// A single picture of no more numbers is too small for them on the CPU in fp32: libtorch has a convolution of its own for it.
constexpr int64_t SMALL_CONVOLUTION = 20480;
// With one thread it takes its own for kernels of one pixel as well, of fewer pictures than these.
constexpr int64_t MANY_PICTURES = 16;

// Whether libtorch's own convolution is taken on the CPU in fp32.
bool own_convolution(const Tensor &input, int64_t kernel, int64_t stride) {
  if (!plays(Platform::Cpu) || input.scalar_type() != at::kFloat) return false;
  const bool pixels = kernel == 1 && stride == 1 && plan().threads == 1 && input.size(0) < MANY_PICTURES;
  return pixels || (input.size(0) == 1 && input.numel() <= SMALL_CONVOLUTION);
}

// Whether this processor's half-precision kernels are those whose workspaces were counted: AVX-512's without AMX. Elsewhere oneDNN has
// others, or none.
bool counted() {
  static const bool known = [] {
    const auto all = at::cpu::get_cpu_capabilities();
    const auto has = [&](const char *name) {
      const auto found = all.find(name);
      return found != all.end() && found->second.isBool() && found->second.toBool();
    };
    return has("avx512_bf16") && !has("amx_tile");
  }();
  return known;
}

// Bytes of a tensor whose channels are filled up to whole blocks, as oneDNN does on the CPU.
int64_t filled(const Tensor &tensor) {
  const auto size = static_cast<int64_t>(tensor.nbytes()), channels = tensor.size(1);
  const bool fills = plays(Platform::Cpu) && (tensor.scalar_type() == at::kFloat || counted());
  return fills ? size / channels * whole_blocks(channels) : size;
}

// Bytes of sums in fp32 that a half-precision convolution of one pixel keeps on the CPU: one for each thread, but where there are
// so many channels that threads share these out instead of the pixels.
int64_t sums_of_pixels(int64_t channels, int64_t pixels) {
  const int64_t threads = plan().threads, copies = 4 * channels >= threads * pixels ? 1 : threads;
  return 128 + copies * channels * pixels * static_cast<int64_t>(sizeof(float));
}

// The output of a convolution and, for its time, the workspaces: what is read, the weight and what is written, each in the order
// that the kernel works in. `input` is the forward pass's, by which libtorch chooses the kernel of both passes. Measured on the CPU
// by counting allocations; for CUDA what cuDNN is known to do.
Tensor product(const Tensor &from, const Tensor &weight, IntArrayRef shape, bool transposed, int64_t stride, const Tensor &input) {
  const auto format = format_of(from, weight);
  const auto result = [&] { return at::empty(shape, from.options().memory_format(format)); };
  const bool cpu = plays(Platform::Cpu), half = from.scalar_type() != at::kFloat, last = format == at::MemoryFormat::ChannelsLast;
  const Tensor ordered = from.is_contiguous(format) ? from : at::empty(from.sizes(), from.options().memory_format(format));
  const int64_t kernel = weight.numel() / (weight.size(0) * weight.size(1));
  if (cpu && kernel == 1 && !half) return result();
  const int64_t size = static_cast<int64_t>(weight.nbytes());
  if (own_convolution(input, kernel, stride)) {
    const int64_t channels = transposed ? shape[1] : from.size(1);
    int64_t pixels = 1;
    for (size_t axis = 2; axis < shape.size(); ++axis) pixels *= transposed ? from.size(axis) : shape[axis];
    const Tensor around = bytes(4 * channels * kernel * pixels);
    return result();
  }
  if (last) {
    const Tensor reordered = kernel > 1 || !cpu ? bytes(size) : Tensor();
    Tensor out = result();
    if (cpu) bytes(size);
    return out;
  }
  int64_t count = static_cast<int64_t>(from.element_size()), pixels = 1;
  for (const int64_t axis : shape) count *= axis;
  for (size_t axis = 2; axis < shape.size(); ++axis) pixels *= shape[axis];
  const bool known = cpu && half && counted();
  const int64_t channels = shape[1], written = half && !known ? count : count / channels * whole_blocks(channels);
  // Fewer channels than a block are read as they lie, and so is their weight.
  const bool blocks = known && (kernel > 1 && !transposed ? from.size(1) >= BLOCKED_CHANNELS : true);
  const bool plain = !blocks && from.size(1) < BLOCKED_CHANNELS;
  const int64_t read = blocks ? filled(from) : plain ? 0 : static_cast<int64_t>(from.nbytes());
  const int64_t weights = blocks ? size / (from.size(1) * channels) * whole_blocks(from.size(1)) * whole_blocks(channels) : size;
  bytes(read + weights + written + (known && kernel == 1 ? sums_of_pixels(whole_blocks(channels), pixels) : 0));
  const Tensor blocked = bytes(written);
  Tensor out = result();
  if (cpu && ((half && !known) || (transposed && stride > 1))) bytes(count);
  return out;
}

Tensor convolution(const Tensor &input, const Tensor &weight, const optional<Tensor> &, IntArrayRef stride, IntArrayRef padding,
                   IntArrayRef dilation, bool transposed, IntArrayRef output_padding, int64_t groups) {
  std::vector<int64_t> shape{input.size(0), transposed ? weight.size(1) * groups : weight.size(0)};
  TORCH_CHECK(input.size(1) == (transposed ? weight.size(0) : weight.size(1) * groups), "convolution of ", input.sizes(), " with ",
              weight.sizes());
  for (int64_t axis = 2; axis < input.dim(); ++axis) {
    const int64_t s = side(stride, axis - 2), p = side(padding, axis - 2), d = side(dilation, axis - 2), k = weight.size(axis);
    shape.push_back(transposed ? (input.size(axis) - 1) * s - 2 * p + d * (k - 1) + side(output_padding, axis - 2) + 1
                               : (input.size(axis) + 2 * p - d * (k - 1) - 1) / s + 1);
  }
  return product(input, weight, shape, transposed, side(stride, 0), input);
}

// Bytes that the gradient of a weight takes on the side in half precision on the CPU: what is read, the weight and what is given in
// blocks of channels; and for kernels of several pixels a sum in fp32 and a transposed copy of a picture's rows, once. oneDNN keeps
// them once for each thread where it cuts a picture among threads, which is not known here.
int64_t half_weight_gradient(const Tensor &given, const Tensor &input, const Tensor &weight) {
  const int64_t outputs = whole_blocks(given.size(1)), inputs = whole_blocks(input.size(1));
  const int64_t taps = weight.numel() / (weight.size(0) * weight.size(1)), half = static_cast<int64_t>(input.element_size());
  const int64_t copies = filled(given) + filled(input) + outputs * inputs * taps * half;
  if (taps == 1 || input.dim() != 4) return copies;
  const int64_t read = inputs * input.size(2) * (input.size(3) + 2) * half, written = outputs * given.size(2) * given.size(3) * half;
  constexpr int64_t BARRIERS = 388, OF_A_THREAD = 8192;
  return copies + outputs * inputs * taps * static_cast<int64_t>(sizeof(float)) + read + written + BARRIERS + OF_A_THREAD * plan().threads;
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor &given, const Tensor &input, const Tensor &weight,
                                                        at::OptionalIntArrayRef bias, IntArrayRef stride, IntArrayRef, IntArrayRef,
                                                        bool transposed, IntArrayRef, int64_t, std::array<bool, 3> mask) {
  Tensor to_input, to_weight, to_bias;
  const auto format = format_of(input, weight);
  const Tensor ordered = given.contiguous(format);
  if (mask[0]) to_input = product(ordered, weight, input.sizes(), !transposed, side(stride, 0), input);
  if (mask[1]) {
    to_weight = at::empty_like(weight);
    const bool half = plays(Platform::Cpu) && input.scalar_type() != at::kFloat && counted();
    // Below a block on both sides it works on what is there.
    const bool few = input.size(1) < BLOCKED_CHANNELS && given.size(1) < BLOCKED_CHANNELS;
    const int64_t kernel = weight.numel() / (weight.size(0) * weight.size(1));
    const bool alone = kernel == 1 && own_convolution(input, kernel, side(stride, 0));
    if (!alone)
      bytes(half && !few ? half_weight_gradient(given, input, weight)
                         : filled(given) + static_cast<int64_t>(input.nbytes() + weight.nbytes()));
  }
  if (mask[2]) to_bias = make(bias.has_value() ? *bias : IntArrayRef({given.size(1)}), given);
  return {to_input, to_weight, to_bias};
}

// ---- normalisations

std::tuple<Tensor, Tensor, Tensor> group_norm(const Tensor &input, const optional<Tensor> &, const optional<Tensor> &, int64_t items,
                                              int64_t, int64_t, int64_t groups, double) {
  return {at::empty_like(input, input.suggest_memory_format()), make({items, groups}, input), make({items, groups}, input)};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_backward(const Tensor &given, const Tensor &input, const Tensor &, const Tensor &,
                                                       const optional<Tensor> &, int64_t items, int64_t channels, int64_t,
                                                       int64_t groups, std::array<bool, 3> mask) {
  const Tensor ordered = given.is_contiguous(input.suggest_memory_format()) ? given : at::empty_like(input);
  Tensor sums, factors;
  sums = make({2, items, channels}, input, single(input.scalar_type()));
  if (plays(Platform::Cuda)) factors = make({items, channels + 2 * groups}, input, single(input.scalar_type()));
  return {mask[0] ? at::empty_like(input) : Tensor(), mask[1] ? make({channels}, input) : Tensor(), mask[2] ? make({channels}, input) : Tensor()};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor &input, IntArrayRef normalised, const optional<Tensor> &,
                                              const optional<Tensor> &, double) {
  std::vector<int64_t> rows = input.sizes().vec();
  for (size_t axis = rows.size() - normalised.size(); axis < rows.size(); ++axis) rows[axis] = 1;
  // CUDA keeps statistics in fp32.
  const auto kind = plays(Platform::Cuda) ? single(input.scalar_type()) : input.scalar_type();
  const Tensor ordered = input.contiguous();
  return {at::empty_like(input, at::MemoryFormat::Contiguous), make(rows, input, kind), make(rows, input, kind)};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor &given, const Tensor &input, IntArrayRef normalised, const Tensor &,
                                                       const Tensor &, const optional<Tensor> &, const optional<Tensor> &,
                                                       std::array<bool, 3> mask) {
  const Tensor ordered[] = {given.contiguous(), input.contiguous()};
  // Each thread of the CPU sums up for itself.
  Tensor sums;
  if (plays(Platform::Cpu) && (mask[1] || mask[2])) sums = make({2, plan().threads, normalised.back()}, input);
  return {mask[0] ? at::empty_like(input, at::MemoryFormat::Contiguous) : Tensor(), mask[1] ? make(normalised, input) : Tensor(),
          mask[2] ? make(normalised, input) : Tensor()};
}

// ---- embeddings, look-ups

Tensor index_select(const Tensor &own, int64_t axis, const Tensor &index) {
  std::vector<int64_t> shape = own.sizes().vec();
  if (!shape.empty()) shape[at::maybe_wrap_dim(axis, own.dim())] = index.numel();
  return make(shape, own);
}
Tensor triu_indices(int64_t rows, int64_t columns, int64_t offset, optional<ScalarType> kind, optional<at::Layout>,
                    optional<at::Device>, optional<bool>) {
  int64_t count = 0;
  for (int64_t row = 0; row < rows; ++row) count += std::max<int64_t>(0, columns - std::max<int64_t>(0, row + offset));
  return at::empty({2, count}, at::TensorOptions(kind.value_or(at::kLong)).device(at::kMeta));
}
Tensor embedding_backward(const Tensor &given, const Tensor &indices, int64_t weights, int64_t, bool) {
  const Tensor ordered = given.contiguous();
  if (plays(Platform::Cuda)) bytes(4 * 8 * indices.numel());
  return make({weights, given.size(-1)}, given);
}

// ---- attention

int64_t rows_of(int64_t queries) { return std::min<int64_t>(queries, queries >= 768 ? 256 : queries >= 192 ? 64 : 32); }

std::tuple<Tensor, Tensor> attention_cpu(const Tensor &q, const Tensor &k, const Tensor &v, double, bool, const optional<Tensor> &,
                                         optional<double>) {
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), width = v.size(3);
  Tensor output = at::empty_like(q);
  Tensor sums = make({batch, queries, heads}, q, single(q.scalar_type())).transpose(1, 2);
  if (plays(Platform::Cpu)) {
    const int64_t rows = rows_of(queries), columns = std::min<int64_t>(k.size(2), 512), half = q.scalar_type() != at::kFloat;
    // Elsewhere than on the processors that were counted, keys and values are packed as a whole.
    const int64_t reordered = half && !counted() ? 2 * 2 * batch * heads * k.size(2) * width : 0;
    bytes(plan().threads * (4 * (rows * columns + 2 * rows + rows * width) + half * 2 * rows * columns) + reordered);
  }
  return {output, sums};
}
std::tuple<Tensor, Tensor, Tensor> attention_cpu_backward(const Tensor &given, const Tensor &q, const Tensor &k, const Tensor &v, const Tensor &,
                                                          const Tensor &, double, bool, const optional<Tensor> &, optional<double>) {
  const auto like = [](const Tensor &of) { return make({of.size(0), of.size(2), of.size(1), of.size(3)}, of).transpose(1, 2); };
  std::tuple<Tensor, Tensor, Tensor> result{like(q), like(k), like(v)};
  const Tensor ordered = given.transpose(1, 2).contiguous();
  if (plays(Platform::Cpu)) {
    const int64_t half = q.scalar_type() != at::kFloat;
    const int64_t rows = rows_of(q.size(2)), columns = std::min<int64_t>(k.size(2), 512);
    const int64_t threads = plan().threads, width = q.size(3);
    // In half precision each thread's products have a workspace, which oneDNN lays out for several threads: about so much, of an AVX-512.
    const int64_t workspace = half && counted() ? std::min<int64_t>(threads, 3) * rows * (columns + 4 * width) : 0;
    bytes(threads * (rows * (columns * 2 * (4 + 2 * half) + 4) + workspace));
  }
  return result;
}

using Fused = std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor>;
// CUDA's flash attention: fp16 and bf16. Output, one number a row, seeds.
Fused flash(const Tensor &q, const Tensor &k, const Tensor &v, double, bool, bool, optional<double>) {
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2);
  // Widths that are not multiples of 8 are padded by the caller.
  Tensor output = make({batch, queries, heads, v.size(3)}, q).transpose(1, 2);
  return {output, make({batch, heads, queries}, q, at::kFloat), Tensor(), Tensor(), queries, k.size(2), make({2}, q, at::kUInt64),
          make({}, q, at::kUInt64), make({0}, q)};
}
std::tuple<Tensor, Tensor, Tensor> flash_backward(const Tensor &, const Tensor &q, const Tensor &k, const Tensor &v, const Tensor &,
                                                  const Tensor &, const Tensor &, const Tensor &, c10::SymInt, c10::SymInt, double, bool,
                                                  const Tensor &, const Tensor &, optional<double>) {
  const auto like = [](const Tensor &of) { return make({of.size(0), of.size(2), of.size(1), of.size(3)}, of).transpose(1, 2); };
  std::tuple<Tensor, Tensor, Tensor> result{like(q), like(k), like(v)};
  const int64_t rounded = (q.size(2) + 127) / 128 * 128, width = (q.size(3) + 31) / 32 * 32;
  // The query's gradient is summed in fp32, over whole tiles; one number a row beside it.
  const Tensor sums = bytes(4 * q.size(0) * q.size(1) * rounded), whole = bytes(4 * q.size(0) * q.size(1) * rounded * width);
  Tensor expanded;
  if (k.size(1) != q.size(1)) expanded = bytes(2 * static_cast<int64_t>(q.nbytes()) / q.size(2) * k.size(2));
  return result;
}
// CUDA's memory-efficient attention: fp32, or with a mask.
std::tuple<Tensor, Tensor, Tensor, Tensor> efficient(const Tensor &q, const Tensor &, const Tensor &v, const optional<Tensor> &, bool keeps,
                                                     double, bool, optional<double>) {
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2);
  Tensor output = make({batch, queries, heads, v.size(3)}, q).transpose(1, 2);
  if (q.scalar_type() != at::kFloat) bytes(4 * output.numel());
  return {output, make({batch, heads, keeps ? (queries + 31) / 32 * 32 : 0}, q, at::kFloat), make({}, q, at::kLong), make({}, q, at::kLong)};
}
std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_backward(const Tensor &, const Tensor &q, const Tensor &k, const Tensor &v,
                                                              const Tensor &, const Tensor &, const Tensor &, const Tensor &, const Tensor &,
                                                              double, std::array<bool, 4>, bool, optional<double>) {
  const auto like = [](const Tensor &of) { return make({of.size(0), of.size(2), of.size(1), of.size(3)}, of).transpose(1, 2); };
  std::tuple<Tensor, Tensor, Tensor, Tensor> result{like(q), like(k), like(v), Tensor()};
  const Tensor delta = bytes(4 * q.size(0) * q.size(1) * q.size(2));
  if (q.scalar_type() != at::kFloat) bytes(4 * (q.numel() + k.numel() + v.numel()));
  return result;
}

// Which kernel real tensors of the platform would go to; libtorch's own choice asks a device that is not here.
Tensor attention(const Tensor &query, const Tensor &key, const Tensor &value, const optional<Tensor> &given, double dropout, bool causal,
                 optional<double> scale, bool gqa) {
  TORCH_CHECK(query.dim() == 4, "attention of ", query.sizes());
  optional<Tensor> mask = given;
  const bool wants = at::GradMode::is_enabled() && (query.requires_grad() || key.requires_grad() || value.requires_grad());
  if (mask && mask->defined() && mask->scalar_type() == at::kBool) {
    Tensor numbers = at::zeros(mask->sizes(), query.options());
    mask = numbers.masked_fill_(mask->logical_not(), -1);
  }
  const bool masked = mask && mask->defined();
  if (plays(Platform::Cuda)) {
    if (query.scalar_type() == at::kFloat || masked) {
      Tensor k = key, v = value;
      if (gqa) {
        k = key.repeat_interleave(query.size(1) / key.size(1), 1);
        v = value.repeat_interleave(query.size(1) / value.size(1), 1);
      }
      return std::get<0>(at::_scaled_dot_product_efficient_attention(query, k, v, mask, wants, dropout, causal, scale));
    }
    const int64_t width = query.size(3), missing = (8 - width % 8) % 8;
    const auto padded = [&](const Tensor &own) { return missing == 0 ? own : at::constant_pad_nd(own, {0, missing}); };
    const Tensor whole = std::get<0>(at::_scaled_dot_product_flash_attention(padded(query), padded(key), padded(value), dropout, causal,
                                                                             false, scale.value_or(1 / std::sqrt(double(width)))));
    return missing == 0 ? whole : whole.slice(-1, 0, width);
  }
  return std::get<0>(at::_scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout, causal, mask, scale));
}

// libtorch's own asks whether the device is the CPU, which reads in any order.
Tensor whole_group_norm(const Tensor &input, int64_t groups, const optional<Tensor> &weight, const optional<Tensor> &bias, double epsilon, bool) {
  const Tensor ordered = plays(Platform::Cuda) ? input.contiguous() : input.contiguous(input.suggest_memory_format());
  return std::get<0>(at::native_group_norm(ordered, weight, bias, input.size(0), input.size(1), input.numel() / (input.size(0) * input.size(1)), groups, epsilon));
}
// CUDA keeps a byte for each number, the CPU a number.
Tensor dropout(const Tensor &input, double p, bool train) {
  if (p == 0 || !train || input.numel() == 0) return input;
  if (plays(Platform::Cuda)) return std::get<0>(at::native_dropout(input, p, train));
  return input * at::empty_like(input).bernoulli_(1 - p).div_(1 - p);
}
std::tuple<Tensor, Tensor> native_dropout(const Tensor &input, double, optional<bool>) { return {at::empty_like(input), at::empty_like(input, input.options().dtype(at::kBool))}; }
Tensor native_dropout_backward(const Tensor &given, const Tensor &, double) { return at::empty_like(given); }

// ---- reductions

// A sum or mean in another number type. The CPU converts what it reads beforehand; CUDA reads half precision as it is.
Tensor reduced(const Tensor &from, at::OptionalIntArrayRef axes, bool keep, optional<ScalarType> kind) {
  const ScalarType into = kind.value_or(at::isIntegralType(from.scalar_type(), true) ? at::kLong : from.scalar_type());
  const bool as_it_is = plays(Platform::Cuda) && into == at::kFloat && from.element_size() == 2;
  Tensor converted;
  if (into != from.scalar_type() && !as_it_is) converted = at::empty_like(from, from.options().dtype(into));
  const auto gone = at::dim_list_to_bitset(axes, from.dim());
  std::vector<int64_t> shape;
  for (int64_t axis = 0; axis < from.dim(); ++axis) {
    const bool whole = axes.has_value() && !axes->empty() && !gone[axis];
    if (whole || keep) shape.push_back(whole ? from.size(axis) : 1);
  }
  return make(shape, from, into);
}

// ---- losses, optimisers, scalars, copies

Tensor mse_backward(const Tensor &, const Tensor &own, const Tensor &target, int64_t) {
  return at::empty(at::infer_size(own.sizes(), target.sizes()), own.options());
}
void adamw(at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList, double, double, double, double,
           double, bool, bool, const optional<Tensor> &, const optional<Tensor> &) {}
void unscale(at::TensorList, Tensor &, const Tensor &) {}

// Numbers that are read: 1, true, and 0 for whole numbers, as the codes of linear algebra say that all went well. What is decided by
// them is decided so.
int answer(ScalarType kind) { return at::isIntegralType(kind, /*includeBool=*/false) ? 0 : 1; }
at::Scalar read(const Tensor &own) {
  const int value = answer(own.scalar_type());
  return own.scalar_type() == at::kBool ? at::Scalar(value != 0) : at::isFloatingType(own.scalar_type()) ? at::Scalar(double(value)) : at::Scalar(value);
}

Tensor &copy(Tensor &to, const Tensor &from, bool) {
  TORCH_CHECK(at::is_expandable_to(from.sizes(), to.sizes()), "copy of ", from.sizes(), " into ", to.sizes());
  if (to.is_cpu() && !from.is_cpu()) to.fill_(answer(to.scalar_type()));
  return to;
}

const Tensor &resize(const Tensor &own, IntArrayRef shape, optional<at::MemoryFormat> format) {
  // libtorch's own grows the storage without asking the allocator.
  auto *impl = own.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(shape);
  if (format && *format != at::MemoryFormat::Preserve) impl->empty_tensor_restride(*format);
  const size_t need = at::detail::computeStorageNbytes(impl->sizes(), impl->strides(), impl->dtype().itemsize(), impl->storage_offset());
  auto *storage = impl->unsafe_storage().unsafeGetStorageImpl();
  if (need > storage->nbytes()) {
    storage->set_data_ptr_noswap(c10::GetAllocator(at::kMeta)->allocate(need));
    storage->set_nbytes(need);
  }
  return own;
}

Tensor where(const Tensor &condition, const Tensor &a, const Tensor &b) {
  const auto kind = at::result_type(a, b);
  return at::empty(at::infer_size(at::infer_size(condition.sizes(), a.sizes()), b.sizes()), a.options().dtype(kind).device(at::kMeta));
}
Tensor like_bool(const Tensor &own) { return at::empty_like(own, own.options().dtype(at::kBool)); }
Tensor like(const Tensor &own) { return at::empty_like(own); }
Tensor &same_out(const Tensor &own, Tensor &out) { out.resize_(own.sizes()); return out; }
Tensor bucketize(const Tensor &own, const Tensor &, bool narrow, bool) { return make(own.sizes(), own, narrow ? at::kInt : at::kLong); }
Tensor one(const Tensor &own) { return make({}, own); }

void all_went_well(const Tensor &, c10::string_view, bool) {}

TORCH_LIBRARY_IMPL(aten, Meta, m) {
  m.impl("convolution", convolution);
  m.impl("convolution_backward", convolution_backward);
  m.impl("native_group_norm", group_norm);
  m.impl("native_group_norm_backward", group_norm_backward);
  m.impl("native_layer_norm", layer_norm);
  m.impl("native_layer_norm_backward", layer_norm_backward);
  m.impl("index_select", index_select);
  m.impl("triu_indices", triu_indices);
  m.impl("embedding_dense_backward", embedding_backward);
  m.impl("_scaled_dot_product_flash_attention_for_cpu", attention_cpu);
  m.impl("_scaled_dot_product_flash_attention_for_cpu_backward", attention_cpu_backward);
  m.impl("_scaled_dot_product_flash_attention", flash);
  m.impl("_scaled_dot_product_flash_attention_backward", flash_backward);
  m.impl("_scaled_dot_product_efficient_attention", efficient);
  m.impl("_scaled_dot_product_efficient_attention_backward", efficient_backward);
  m.impl("scaled_dot_product_attention", attention);
  m.impl("native_dropout", native_dropout);
  m.impl("native_dropout_backward", native_dropout_backward);
  m.impl("sum.dim_IntList", reduced);
  m.impl("mean.dim", reduced);
  m.impl("mse_loss_backward", mse_backward);
  m.impl("_fused_adamw_", adamw);
  m.impl("_amp_foreach_non_finite_check_and_unscale_", unscale);
  m.impl("_local_scalar_dense", read);
  m.impl("copy_", copy);
  m.impl("resize_", resize);
  m.impl("where.self", where);
  m.impl("abs.out", same_out);
  m.impl("logical_not.out", same_out);
  m.impl("bucketize.Tensor", bucketize);
  m.impl("isnan", like_bool);
  m.impl("relu", like);
  m.impl("max", one);
  m.impl("min", one);
}
// What libtorch composes by the device, on this one.
TORCH_LIBRARY_IMPL(aten, AutogradIPU, m) {
  m.impl("scaled_dot_product_attention", attention);
  m.impl("group_norm", whole_group_norm);
  m.impl("dropout", dropout);
}
TORCH_LIBRARY_IMPL(aten, IPU, m) {
  m.impl("_linalg_check_errors", all_went_well);
  m.impl("scaled_dot_product_attention", attention);
  m.impl("group_norm", whole_group_norm);
  m.impl("dropout", dropout);
}

} // namespace lora::dry::kernels
