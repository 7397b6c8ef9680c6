// The device without memory. Its tensors are ordinary ones but for their storage, which no address belongs to; what is done to
// them is done by libtorch's Meta kernels, to Meta tensors over the same storage. Above the kernels nothing knows of that:
// autograd treats them as tensors of a device, where it treats Meta tensors as something of their own and never adds
// into them in place.

#include "dry.h"

#include <ATen/ATen.h>
#include <ATen/NativeFunctions.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace lora::dry::device_type {

using at::Tensor;
using c10::IValue;

constexpr auto KEY = c10::DispatchKey::IPU;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<TYPE> {
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  c10::Device getDevice() const override { return device(); }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, device()); }
  c10::Stream getNewStream(c10::Device, int) const override { return c10::Stream(c10::Stream::DEFAULT, device()); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, device()); }
};
// Registered when the library is loaded: the autograd engine makes its threads once, for the devices that there are then.
C10_REGISTER_GUARD_IMPL(IPU, Guard);

// The same tensor under another key and on another device.
struct Impl final : c10::TensorImpl {
  Impl(const c10::TensorImpl &of, c10::DispatchKey key, c10::Device device)
      : TensorImpl(c10::Storage(of.storage()), c10::DispatchKeySet(key), of.dtype()) {
    device_opt_ = device;
    set_sizes_and_strides(of.sizes(), of.strides(), of.storage_offset());
    if (of.is_wrapped_number()) set_wrapped_number(true);
  }
};

bool is_ours(const Tensor &tensor) { return tensor.defined() && is_dry(tensor); }

bool has_meta_key(const Tensor &tensor) {
  return tensor.defined() && tensor.key_set().has_backend(c10::BackendComponent::MetaBit);
}

Tensor as_meta(const Tensor &tensor) {
  return Tensor(c10::make_intrusive<Impl>(*tensor.unsafeGetTensorImpl(), c10::DispatchKey::Meta, c10::Device(at::kMeta)));
}

// Views that libtorch makes for any device ask the storage for it.
void claim(const c10::Storage &storage) {
  auto *impl = storage.unsafeGetStorageImpl();
  if (impl->device() == device()) return;
  auto context = impl->set_data_ptr(c10::DataPtr()).move_context();
  const auto deleter = context.get_deleter();
  impl->set_data_ptr_noswap(c10::DataPtr(nullptr, context.release(), deleter, device()));
}

Tensor as_dry(const Tensor &meta) {
  claim(meta.storage());
  return Tensor(c10::make_intrusive<Impl>(*meta.unsafeGetTensorImpl(), KEY, device()));
}

// Calls `change` on each tensor in a value, whether it changes it or not; lists are made anew.
template <typename Change>
void each(IValue &value, Change &&change) {
  if (value.isTensor()) {
    Tensor tensor = value.toTensor();
    if (change(tensor)) value = tensor;
  } else if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (Tensor tensor : value.toTensorVector()) {
      change(tensor);
      list.push_back(tensor);
    }
    value = list;
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (std::optional<Tensor> tensor : value.toOptionalTensorVector()) {
      if (tensor) change(*tensor);
      list.push_back(tensor);
    }
    value = list;
  } else if (value.isDevice() && value.toDevice().type() == TYPE) {
    value = c10::Device(at::kMeta);
  }
}

// A tensor of ours that a kernel was given, and what the kernel saw in its place.
struct Pair {
  Tensor ours, meta;
};

// Where a kernel gave a tensor another storage or shape, so has ours.
void follow(const Pair &pair) {
  claim(pair.meta.storage());
  auto *to = pair.ours.unsafeGetTensorImpl();
  const auto *from = pair.meta.unsafeGetTensorImpl();
  if (!from->storage().is_alias_of(to->storage())) to->set_storage_keep_dtype(from->storage());
  if (from->sizes() != to->sizes() || from->strides() != to->strides() || from->storage_offset() != to->storage_offset()) {
    to->set_sizes_and_strides(from->sizes(), from->strides(), from->storage_offset());
  }
}

// Any operation: by its Meta kernel.
void by_meta(const c10::OperatorHandle &operation, c10::DispatchKeySet, torch::jit::Stack *stack) {
  const auto &schema = operation.schema();
  const size_t arguments = schema.arguments().size(), results = schema.returns().size();
  std::vector<Pair> pairs;
  for (size_t i = 0; i < arguments; ++i) {
    each(torch::jit::peek(*stack, i, arguments), [&](Tensor &tensor) {
      if (!is_ours(tensor)) return false;
      pairs.push_back({tensor, as_meta(tensor)});
      tensor = pairs.back().meta;
      return true;
    });
  }
  operation.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::Meta), stack);
  for (size_t i = 0; i < results; ++i) {
    each(torch::jit::peek(*stack, i, results), [&](Tensor &tensor) {
      if (!has_meta_key(tensor)) return false;
      // What was given and comes back is the tensor itself.
      for (const Pair &pair : pairs) {
        if (pair.meta.is_same(tensor)) {
          tensor = pair.ours;
          return true;
        }
      }
      tensor = as_dry(tensor);
      return true;
    });
  }
  if (!schema.is_mutable()) return;
  for (const Pair &pair : pairs) follow(pair);
}

TORCH_LIBRARY_IMPL(_, IPU, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_meta>()); }

#ifndef __APPLE__
// tch has names for five devices and calls every other one MPS, which no build for this system has kernels for: what is asked of
// MPS is done here.
constexpr auto NAME = c10::DeviceType::MPS;

struct Named final : c10::impl::NoOpDeviceGuardImpl<NAME> {
  c10::Device getDevice() const override { return c10::Device(NAME, 0); }
  c10::DeviceIndex deviceCount() const noexcept override { return 0; }
};
C10_REGISTER_GUARD_IMPL(MPS, Named);

std::optional<c10::Device> resolved(std::optional<c10::Device> place) {
  return place && place->type() == NAME ? device() : place;
}

void make(const c10::OperatorHandle &operation, c10::DispatchKeySet, torch::jit::Stack *stack) {
  const size_t count = operation.schema().arguments().size();
  for (size_t i = 0; i < count; ++i) {
    IValue &value = torch::jit::peek(*stack, i, count);
    if (value.isDevice()) value = *resolved(value.toDevice());
  }
  operation.redispatchBoxed(c10::DispatchKeySet(KEY), stack);
}

// To where a tensor is already: not a copy.
Tensor to_layout(const Tensor &tensor, std::optional<at::ScalarType> kind, std::optional<at::Layout> layout,
                 std::optional<at::Device> place, std::optional<bool> pinned, bool later, bool copy,
                 std::optional<at::MemoryFormat> format) {
  return at::native::to(tensor, kind, layout, resolved(place), pinned, later, copy, format);
}
Tensor to_device(const Tensor &tensor, at::Device place, at::ScalarType kind, bool later, bool copy,
                 std::optional<at::MemoryFormat> format) {
  return at::native::to(tensor, *resolved(place), kind, later, copy, format);
}

TORCH_LIBRARY_IMPL(_, MPS, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&make>()); }
TORCH_LIBRARY_IMPL(aten, AutogradIPU, m) {
  m.impl("to.dtype_layout", to_layout);
  m.impl("to.device", to_device);
}
#endif

} // namespace lora::dry::device_type

namespace lora::dry {

// Whatever has a Meta kernel goes to it, ours among them: some operations libtorch would take apart for a device that it does not
// know, into others than those of the real ones.
void register_kernels() {
  using device_type::KEY;
  static auto *library = new torch::Library(torch::Library::IMPL, "aten", KEY, __FILE__, __LINE__);
  auto &dispatcher = c10::Dispatcher::singleton();
  for (const auto &name : dispatcher.getAllOpNames()) {
    const auto operation = dispatcher.findOp(name);
    if (!operation || name.name.rfind("aten::", 0) != 0 || !operation->hasKernelForDispatchKey(c10::DispatchKey::Meta)) continue;
    if (operation->hasKernelForDispatchKey(KEY)) continue;
    const std::string full = name.name.substr(6) + (name.overload_name.empty() ? "" : "." + name.overload_name);
    library->impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&device_type::by_meta>());
  }
}

} // namespace lora::dry
