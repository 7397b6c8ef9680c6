// NF4 with double quantisation (Dettmers et al., "QLoRA", 2023), number for number as bitsandbytes defines it: see nf4.cpp.

#pragma once

#include <ATen/core/Tensor.h>

namespace lora::nf4 {

// A weight in 4.13 bits a number.
struct Quantised {
  at::Tensor packed; // two codes a byte, the first in the high half, over the row-major weight
  at::Tensor absmax; // a dynamic 8-bit code for the largest magnitude of each block of 64
  at::Tensor nested; // f32, the largest magnitude of each block of 256 of those, offset taken off
  at::Tensor offset; // f32 scalar, the mean of the largest magnitudes
};

// Numbers that share a largest magnitude.
constexpr int64_t BLOCK = 64;

// Code tables on a device, made once for each and never freed.
struct Tables {
  at::Tensor between, code, pairs, dynamic, dynamic_between;
};
const Tables &tables(at::Device device);

// Whether `own` is made whole by a kernel, for which its magnitudes need not be there.
bool by_kernel(const Quantised &own, bool portable);

// `portable`: by libtorch's operations alone; the numbers are the same.
Quantised quantise(const at::Tensor &weight, bool portable);

// The largest magnitude of each block, as it comes back: f32.
at::Tensor magnitudes(const Quantised &own);

// `count` numbers from `start` on, which begins a block, in one row; `most` are the weight's magnitudes, which a kernel
// does without.
at::Tensor dequantise(const Quantised &own, at::Tensor most, int64_t start, int64_t count, at::ScalarType kind,
                      bool portable);

} // namespace lora::nf4
