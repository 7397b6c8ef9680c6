// A bound on what libtorch's allocator takes from a device, which its headers without CUDA do not offer.

#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <c10/cuda/CUDACachingAllocator.h>

#include <algorithm>
#include <cstdint>

#include "../guard.h"

extern "C" {

// At most so many bytes from now on, cached blocks and the memory of graphs included; all where the device has fewer.
int lora_memory_limit(int64_t device, uint64_t bytes) {
  return lora::guarded([&] {
    // Before the first tensor the allocator does not know its devices.
    at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
    const auto index = static_cast<c10::DeviceIndex>(device);
    const auto total = static_cast<double>(at::accelerator::getMemoryInfo(index).second);
    c10::cuda::CUDACachingAllocator::setMemoryFraction(std::min(1.0, static_cast<double>(bytes) / total), index);
  });
}

} // extern "C"
