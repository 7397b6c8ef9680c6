// Weights in the blocks of llama.cpp's GGUF files, as they lie there: see blocks.cpp.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace lora::blocks {

// By the numbers that GGUF has for them; none for weights that are not in blocks.
enum class Type : int { none = 0, q4_0 = 2, q4_1 = 3, q5_0 = 6, q5_1 = 7, q8_0 = 8, q4_k = 12, q5_k = 13, q6_k = 14 };

// A block's numbers, and the bytes that they lie in.
struct Size {
  int64_t numbers, bytes;
};
Size size_of(Type type);

// `count` numbers from `start` on, both of whole blocks, in one row; `packed` are the weight's bytes. `portable`: by
// libtorch's operations alone; the numbers are the same.
at::Tensor dequantise(const at::Tensor &packed, Type type, int64_t start, int64_t count, at::ScalarType kind,
                      bool portable);

} // namespace lora::blocks
