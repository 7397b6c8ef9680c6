// A frozen weight as it is stored, whole or in few bytes, on the device or in host memory, and rows of it made whole.
// What computes with the rows is in frozen.cpp and cross_entropy.cpp.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "blocks.h"
#include "nf4.h"
#include "staging.h"
#include "dry/dry.h"

extern "C" {

// A weight as Rust holds it. `absmax` and what follows it are there for NF4, `scale` for 8 bits, all may be null.
// `blocks` is a `lora::blocks::Type`. With `staging`, the tensors are in host memory, and the weight of that number
// there.
struct LoraStored {
  const at::Tensor *values, *scale, *absmax, *nested, *offset;
  const int64_t *shape;
  size_t axes;
  int portable, blocks;
  const void *staging;
  int64_t staged;
};

} // extern "C"

namespace lora {

struct Stored {
  explicit Stored(const LoraStored &raw);

  bool is_nf4() const { return nf4.absmax.defined(); }
  bool is_blocks() const { return block_type != blocks::Type::none; }

  // Whether what computes in `kind` can read the values where they are.
  bool is_whole(at::ScalarType kind) const {
    return values.scalar_type() == kind && !scale.defined() && !is_nf4() && !is_blocks();
  }

  // Outputs that are made whole at once; all of them but for large weights.
  int64_t tile() const;

  at::Tensor values, scale;
  lora::nf4::Quantised nf4;
  std::vector<int64_t> shape;
  // Numbers of one output.
  int64_t row = 1;
  bool portable;
  blocks::Type block_type;
  // Where it passes through on its way to the device, if it does.
  std::shared_ptr<Staging> staging;
  int64_t id;
};

// Outputs of a tile of about `numbers` numbers, each output of `row`; all of them where one tile is enough.
int64_t tile_of(int64_t outputs, int64_t row, int64_t numbers);

// A weight where it computes, for as long as this lives.
class Present {
public:
  explicit Present(const Stored &own);
  const Stored &operator*() const { return weight; }

private:
  Stored weight;
  std::optional<Lease> lease;
};

// A weight while it is being made whole, rows of it or all.
class Rows {
public:
  Rows(const Stored &own, at::ScalarType kind);

  // `count` outputs from `start` on.
  at::Tensor operator()(int64_t start, int64_t count) const;

private:
  at::Tensor scaled(const at::Tensor &stored, int64_t start) const;

  const Stored &own;
  at::ScalarType kind;
  // NF4's factors.
  at::Tensor most;
};

inline at::Tensor or_none(const at::Tensor *tensor) { return tensor == nullptr ? at::Tensor() : *tensor; }

} // namespace lora
