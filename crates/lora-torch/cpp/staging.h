// Frozen weights that live in host memory and pass through a ring of device memory: see staging.cpp.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace lora {

class Staging {
public:
  virtual ~Staging() = default;

  // Packs the tensors of one weight into host memory (pinned where the device is not the CPU) and gives them there, in the
  // same order; undefined ones stay undefined. `*id` names the weight from now on.
  virtual std::vector<at::Tensor> add(const std::vector<at::Tensor> &parts, int64_t *id) = 0;

  // The tensors of a weight on the device, fit for the current stream until `release`: views of the ring.
  virtual std::vector<at::Tensor> acquire(int64_t id) = 0;
  virtual void release(int64_t id) noexcept = 0;

  // out[0..3] = bytes of the ring, copies so far, and those of them that were not foreseen.
  virtual void counts(int64_t *out) const = 0;
};

// A weight on the device while this lives.
class Lease {
public:
  Lease(std::shared_ptr<Staging> staging, int64_t id) : parts(staging->acquire(id)), staging(std::move(staging)), id(id) {}
  ~Lease() { staging->release(id); }
  Lease(const Lease &) = delete;
  Lease &operator=(const Lease &) = delete;

  const std::vector<at::Tensor> parts;

private:
  const std::shared_ptr<Staging> staging;
  const int64_t id;
};

} // namespace lora
