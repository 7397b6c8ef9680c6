// What lora-torch needs of libtorch that tch does not wrap: settings and statistics of the accelerator's allocator, and
// kernels over lists of gradients. A C interface; no exception leaves it (guard.h). Tensors cross as the `torch::Tensor*` that
// torch-sys uses. Nothing of CUDA is linked: the accelerator interface dispatches once libtorch_cuda is loaded.

#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/ops/_amp_foreach_non_finite_check_and_unscale.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_addcdiv.h>
#include <ATen/ops/_foreach_addcmul.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/_foreach_div.h>
#include <ATen/ops/_foreach_lerp.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_foreach_sign.h>
#include <ATen/ops/_foreach_sqrt.h>
#include <ATen/ops/_foreach_zero.h>
#include <ATen/ops/_fused_adamw.h>
#include <c10/core/AllocatorConfig.h>
#include <c10/util/env.h>
#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "guard.h"
#include "dry/dry.h"

namespace lora::shim {

using lora::guarded;

std::vector<at::Tensor> list_of(torch::Tensor **tensors, size_t count) {
  std::vector<at::Tensor> list;
  list.reserve(count);
  for (size_t i = 0; i < count; ++i) list.push_back(*tensors[i]);
  return list;
}

// Whether there is an accelerator. Its allocator can be asked from then on, which before the first tensor knows no devices.
bool has_accelerator() {
  if (!at::hasCUDA()) return false;
  at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
  return true;
}

extern "C" {

// Text of this thread's last failure in any of these files; valid until its next one.
const char *lora_shim_last_error() { return lora::last_error().c_str(); }

// out[0..4] = allocated now, allocated peak, reserved now, reserved peak, in bytes. 1 in *available if there is an accelerator.
int lora_shim_memory_stats(int64_t device, int64_t *out, int *available) {
  return guarded([&] {
    *available = 0;
    if (!has_accelerator()) return;
    const auto stats = at::accelerator::getDeviceStats(static_cast<c10::DeviceIndex>(device));
    const auto aggregate = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    out[0] = stats.allocated_bytes[aggregate].current;
    out[1] = stats.allocated_bytes[aggregate].peak;
    out[2] = stats.reserved_bytes[aggregate].current;
    out[3] = stats.reserved_bytes[aggregate].peak;
    *available = 1;
  });
}

// out[0..2] = free, total bytes of the device.
int lora_shim_memory_info(int64_t device, int64_t *out, int *available) {
  return guarded([&] {
    *available = 0;
    if (!has_accelerator()) return;
    const auto info = at::accelerator::getMemoryInfo(static_cast<c10::DeviceIndex>(device));
    out[0] = static_cast<int64_t>(info.first);
    out[1] = static_cast<int64_t>(info.second);
    *available = 1;
  });
}

// Settings of the accelerator's allocator, as in PYTORCH_ALLOC_CONF; to be made before its first allocation.
int lora_shim_allocator_settings(const char *settings) {
  return guarded([&] { c10::CachingAllocator::setAllocatorSettings(settings); });
}

// Sets a variable of the environment that libtorch reads, unless it is set.
int lora_shim_default_variable(const char *name, const char *value) {
  return guarded([&] { c10::utils::set_env(name, value, /*overwrite=*/false); });
}

// *out = a copy of a host tensor on a device, under way: by pinned memory, as a copy out of any other makes the host wait for
// all that the device has to do before it.
int lora_shim_upload(const torch::Tensor *tensor, int64_t device, torch::Tensor **out) {
  return guarded([&] {
    const torch::NoGradGuard no_grad;
    const c10::Device target(c10::kCUDA, static_cast<c10::DeviceIndex>(device));
    *out = new torch::Tensor(tensor->pin_memory().to(target, /*non_blocking=*/true));
  });
}

int lora_shim_empty_cache() {
  return guarded([&] {
    if (has_accelerator()) at::accelerator::emptyCache();
  });
}

int lora_shim_reset_peak(int64_t device) {
  return guarded([&] {
    if (has_accelerator()) at::accelerator::resetPeakStats(static_cast<c10::DeviceIndex>(device));
  });
}

// Multiplies the gradients by `inverse_scale`, then scales them all down to a common L2 norm of `limit` (> 0) where theirs is
// above it, in place. out[0..3] = the sum of `losses`, the norm before, and 1 where an element was not finite: read in one
// piece, so that the host waits for the device once.
int lora_shim_settle(torch::Tensor **gradients, size_t count, const torch::Tensor *losses, double inverse_scale, double limit,
                     double *out) {
  return guarded([&] {
    torch::NoGradGuard no_grad;
    std::vector<at::Tensor> list = list_of(gradients, count);
    const auto options = losses->options().dtype(at::kFloat);
    at::Tensor infinite = at::zeros({1}, options), norm = at::zeros({}, options);
    if (count > 0) {
      at::_amp_foreach_non_finite_check_and_unscale_(list, infinite, at::full({1}, inverse_scale, options));
      norm = at::stack(at::_foreach_norm(list, 2)).norm();
      // The small number is PyTorch's own. One multiplication whatever the norm is: to choose would be to wait.
      if (limit > 0) at::_foreach_mul_(list, (norm + 1e-6).reciprocal_().mul_(limit).clamp_max_(1));
    }
    const at::Tensor sum = losses->sum(at::kDouble);
    const at::Tensor all = at::stack({sum, norm.to(at::kDouble), infinite.to(at::kDouble).squeeze(0)}).cpu();
    std::copy_n(all.const_data_ptr<double>(), 3, out);
    if (lora::dry::is_dry(*losses)) out[2] = 0; // what it reads is 1, which would say that the step is to be skipped
  });
}

// Forgets the gradients of parameters, so that one without a gradient in the next step can be told.
int lora_shim_clear_gradients(torch::Tensor **parameters, size_t count) {
  return guarded([&] {
    for (size_t i = 0; i < count; ++i) parameters[i]->mutable_grad() = at::Tensor();
  });
}

// Gives parameters these gradients.
int lora_shim_put_gradients(torch::Tensor **parameters, torch::Tensor **gradients, size_t count) {
  return guarded([&] {
    for (size_t i = 0; i < count; ++i) {
      TORCH_CHECK(gradients[i]->sizes() == parameters[i]->sizes(), "a gradient of another shape than its parameter");
      parameters[i]->mutable_grad() = *gradients[i];
    }
  });
}

// Adds the gradients of copies in fewer bits to those of the numbers that they stand for, and forgets them.
int lora_shim_collect_gradients(torch::Tensor **copies, torch::Tensor **originals, size_t count) {
  return guarded([&] {
    torch::NoGradGuard no_grad;
    std::vector<at::Tensor> given, given_first, sums, parts, first;
    for (size_t i = 0; i < count; ++i) {
      const at::Tensor &own = copies[i]->grad();
      if (!own.defined()) continue;
      at::Tensor &sum = originals[i]->mutable_grad(), part = at::empty_like(*originals[i]);
      if (sum.defined()) {
        sums.push_back(sum);
        parts.push_back(part);
        given.push_back(own);
      } else {
        sum = part;
        first.push_back(part);
        given_first.push_back(own);
      }
    }
    if (!first.empty()) at::_foreach_copy_(first, given_first);
    if (!sums.empty()) {
      at::_foreach_copy_(parts, given);
      at::_foreach_add_(sums, parts);
    }
    for (size_t i = 0; i < count; ++i) copies[i]->mutable_grad() = at::Tensor();
  });
}

// One AdamW step over a list, in place, by one kernel; `taken` counts the steps of all of them, this one included.
int lora_shim_adamw(torch::Tensor **parameters, torch::Tensor **gradients, torch::Tensor **means, torch::Tensor **squares,
                    size_t count, double taken, double lr, double beta1, double beta2, double decay, double epsilon) {
  return guarded([&] {
    torch::NoGradGuard no_grad;
    std::vector<at::Tensor> values = list_of(parameters, count), slopes = list_of(gradients, count);
    std::vector<at::Tensor> first = list_of(means, count), second = list_of(squares, count);
    // The kernel only reads the counts, so one scalar serves them all.
    std::vector<at::Tensor> counts(count, at::full({}, taken, values.front().options()));
    at::_fused_adamw_(values, slopes, first, second, {}, counts, lr, beta1, beta2, decay, epsilon, /*amsgrad=*/false,
                      /*maximize=*/false);
  });
}

// An elementwise operation over lists, in place on the first; `foreach.rs` has the same numbers. Lists that an operation
// does not take are null.
int lora_shim_foreach(int operation, torch::Tensor **targets, torch::Tensor **others, torch::Tensor **thirds, size_t count,
                      double value) {
  return guarded([&] {
    torch::NoGradGuard no_grad;
    std::vector<at::Tensor> a = list_of(targets, count), b, c;
    if (others != nullptr) b = list_of(others, count);
    if (thirds != nullptr) c = list_of(thirds, count);
    const at::Scalar number(value);
    switch (operation) {
    case 0: return at::_foreach_mul_(a, number);
    case 1: return at::_foreach_add_(a, number);
    case 2: return at::_foreach_add_(a, b, number);
    case 3: return at::_foreach_mul_(a, b);
    case 4: return at::_foreach_div_(a, b);
    case 5: return at::_foreach_addcmul_(a, b, c, number);
    case 6: return at::_foreach_addcdiv_(a, b, c, number);
    case 7: return at::_foreach_lerp_(a, b, number);
    case 8: return at::_foreach_copy_(a, b);
    case 9: return at::_foreach_sqrt_(a);
    case 10: return at::_foreach_sign_(a);
    case 11: return at::_foreach_zero_(a);
    default: TORCH_CHECK(false, "no operation ", operation);
    }
  });
}

// out[i] = a new tensor, factor times the i-th.
int lora_shim_foreach_scaled(torch::Tensor **tensors, size_t count, double factor, torch::Tensor **out) {
  return guarded([&] {
    torch::NoGradGuard no_grad;
    std::vector<at::Tensor> scaled = at::_foreach_mul(list_of(tensors, count), at::Scalar(factor));
    for (size_t i = 0; i < count; ++i) out[i] = new torch::Tensor(std::move(scaled[i]));
  });
}

// *out = a new tensor, [count]: the norm of each, of the first or second order.
int lora_shim_foreach_norms(torch::Tensor **tensors, size_t count, double order, torch::Tensor **out) {
  return guarded([&] {
    torch::NoGradGuard no_grad;
    *out = new torch::Tensor(at::stack(at::_foreach_norm(list_of(tensors, count), at::Scalar(order))));
  });
}

} // extern "C"

} // namespace lora::shim
