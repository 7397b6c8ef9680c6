// What group.cpp and cuda/nccl.cpp, which are compiled into two objects, both know of ranks that train together.

#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

namespace lora::group {

struct Group {
  c10::intrusive_ptr<c10d::Store> store;
  // For tensors in host memory, and for those of a GPU.
  c10::intrusive_ptr<c10d::Backend> host, device;
};

} // namespace lora::group
