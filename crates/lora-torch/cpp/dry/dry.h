// The device without memory: tensors with shapes, strides and number types, but no elements. Networks, adapters, losses and
// optimisers run on it unchanged, and what they would hold is counted. Here is what the code with kernels of its own has to
// know of it; the device is made in device.cpp, libtorch's missing kernels are in kernels.cpp, the counting is in meter.cpp.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace lora::dry {

// A device type of libtorch's that nobody uses. Not PrivateUse1 and not MPS: the autograd engine takes both for accelerators, of
// which a process may have one only.
constexpr auto TYPE = c10::DeviceType::IPU;

// What a dry run plays.
enum class Platform { Cpu, Cuda };

struct Plan {
  Platform platform = Platform::Cpu;
  // Threads of the CPU's kernels, each of which has buffers of its own.
  int64_t threads = 1;
  // What an allocator rounds sizes up to.
  int64_t unit = 1;
};

// The dry run that is under way, or the last one.
Plan &plan();

inline bool plays(Platform platform) { return plan().platform == platform; }
inline c10::Device device() { return c10::Device(TYPE, 0); }
inline bool is_dry(c10::Device device) { return device.type() == TYPE; }
inline bool is_dry(const at::Tensor &tensor) { return is_dry(tensor.device()); }

// Whether code takes the way of the CPU, or dry the way of CUDA's kernels.
inline bool as_on_cpu(const at::Tensor &tensor) { return tensor.is_cpu() || (is_dry(tensor) && plays(Platform::Cpu)); }
inline bool as_on_cuda(const at::Tensor &tensor) { return is_dry(tensor) && plays(Platform::Cuda); }

// What this thread allocates is host memory, or is not: for a GPU it counts apart.
void on_host(bool on);
struct OnHost {
  OnHost() { on_host(true); }
  ~OnHost() { on_host(false); }
};

// What is allocated while this lives has a label; the one in force, to be kept for what is allocated later.
int set_label(int label);
int current_label();
struct Labelled {
  explicit Labelled(int label) : before(set_label(label)) {}
  ~Labelled() { set_label(before); }
  int before;
};

// A copy on the device of what waits in host memory; the same tensor where the device is the host.
inline at::Tensor from_host(const at::Tensor &waiting, c10::Device device) {
  if (is_dry(waiting)) return plays(Platform::Cuda) ? waiting.clone() : waiting;
  return waiting.to(device, /*non_blocking=*/true);
}

// Makes libtorch know the device's kernels; once for the process.
void register_kernels();

} // namespace lora::dry
