// Kernels for CUDA that weights in few bytes are made whole with, where there are any: cuda/kernels.cpp has them, in an
// object that is opened at run time.

#pragma once

#include <c10/util/Exception.h>

#include <atomic>
#include <cstdint>

namespace lora {

namespace nf4 {

// Where a weight's parts lie on a device, with the tables of the codes.
struct Pointers {
  const uint8_t *packed, *absmax;
  const float *nested, *offset, *dynamic, *code;
};

} // namespace nf4

// Each works on the current stream of `device` and gives null, or why it could not.
struct Kernels {
  // Makes `count` numbers of NF4 from a block on.
  const char *(*nf4)(const nf4::Pointers *own, int64_t first_block, int64_t count, int kind, int device, void *values);
  // Makes `count` numbers of int8 or fp8 (e4m3), each `row` of which have a factor.
  const char *(*scaled)(const void *bytes, int fp8, const float *scale, int64_t row, int64_t count, int kind, int device,
                        void *values);
  // Makes `count` numbers of GGUF's blocks, of a type by its number there, each block of `numbers` numbers in `bytes`
  // bytes.
  const char *(*blocks)(const void *packed, int type, int numbers, int bytes, int64_t count, int kind, int device, void *values);
};

// Null where there are none, or no more, as one has failed.
inline std::atomic<const Kernels *> kernels{nullptr};

// Whether a kernel did its work; where not, none is used again.
inline bool done(const char *failure) {
  if (failure == nullptr) return true;
  TORCH_WARN("weights in few bytes are made whole by libtorch's operations, which takes longer: ", failure);
  kernels.store(nullptr);
  return false;
}

} // namespace lora
