// Weights in GGUF's blocks made whole, number for number as ggml's reference does it in f32: by loops of our own on the
// CPU, by a kernel of our own on CUDA (cuda/whole.cu) and by libtorch's operations elsewhere, which the tests hold
// together. What lies where in a block, and what it means, is told in lora-io's `gguf::blocks`. Quantising is not here.

#include "blocks.h"

#include <ATen/ATen.h>
#include <ATen/TensorIterator.h>
#include <c10/core/GradMode.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "dry/dry.h"

namespace lora::blocks {

using at::Tensor;

Size size_of(Type type) {
  switch (type) {
  case Type::q4_0: return {32, 18};
  case Type::q4_1: return {32, 20};
  case Type::q5_0: return {32, 22};
  case Type::q5_1: return {32, 24};
  case Type::q8_0: return {32, 34};
  case Type::q4_k: return {256, 144};
  case Type::q5_k: return {256, 176};
  case Type::q6_k: return {256, 210};
  case Type::none: break;
  }
  TORCH_CHECK(false, "blocks of type ", static_cast<int>(type), " are not known");
}

// ---- loops

// The most numbers of a block.
constexpr int64_t LARGEST = 256;

float half_at(const uint8_t *bytes) {
  uint16_t bits;
  std::memcpy(&bits, bytes, sizeof(bits));
  return c10::detail::fp16_ieee_to_fp32_value(bits);
}

// Each of these makes the numbers of one block.
using Decode = void (*)(const uint8_t *block, float *values);

void q4_0(const uint8_t *block, float *values) {
  const float d = half_at(block);
  for (int i = 0; i < 16; ++i) {
    values[i] = static_cast<float>((block[2 + i] & 15) - 8) * d;
    values[16 + i] = static_cast<float>((block[2 + i] >> 4) - 8) * d;
  }
}

void q4_1(const uint8_t *block, float *values) {
  const float d = half_at(block), m = half_at(block + 2);
  for (int i = 0; i < 16; ++i) {
    values[i] = static_cast<float>(block[4 + i] & 15) * d + m;
    values[16 + i] = static_cast<float>(block[4 + i] >> 4) * d + m;
  }
}

// The numbers of 32 nibbles with a fifth bit each.
void fives(const uint8_t *high, const uint8_t *low, int *q) {
  uint32_t bits;
  std::memcpy(&bits, high, sizeof(bits));
  for (int i = 0; i < 16; ++i) {
    q[i] = (low[i] & 15) | ((bits >> i & 1) << 4);
    q[16 + i] = (low[i] >> 4) | ((bits >> (16 + i) & 1) << 4);
  }
}

void q5_0(const uint8_t *block, float *values) {
  const float d = half_at(block);
  int q[32];
  fives(block + 2, block + 6, q);
  for (int i = 0; i < 32; ++i) values[i] = static_cast<float>(q[i] - 16) * d;
}

void q5_1(const uint8_t *block, float *values) {
  const float d = half_at(block), m = half_at(block + 2);
  int q[32];
  fives(block + 4, block + 8, q);
  for (int i = 0; i < 32; ++i) values[i] = static_cast<float>(q[i]) * d + m;
}

void q8_0(const uint8_t *block, float *values) {
  const float d = half_at(block);
  for (int i = 0; i < 32; ++i) values[i] = static_cast<float>(static_cast<int8_t>(block[2 + i])) * d;
}

// Eight runs of 32 numbers, each with a scale and a minimum of six bits: the first four of each lie in the low bits of
// bytes 0 to 3 and 4 to 7, the others in the nibbles of bytes 8 to 11, their upper bits above those of the first.
// `fifth` may be null.
void k_runs(const uint8_t *block, const uint8_t *fifth, const uint8_t *low, float *values) {
  const float d = half_at(block), e = half_at(block + 2);
  const uint8_t *s = block + 4;
  for (int run = 0; run < 8; ++run) {
    const int scale = run < 4 ? s[run] & 63 : (s[run + 4] & 15) | (s[run - 4] >> 6) << 4;
    const int minimum = run < 4 ? s[run + 4] & 63 : (s[run + 4] >> 4) | (s[run] >> 6) << 4;
    const float factor = d * static_cast<float>(scale), least = e * static_cast<float>(minimum);
    const uint8_t *own = low + run / 2 * 32;
    const int shift = run % 2 * 4;
    for (int i = 0; i < 32; ++i) {
      const int bit = fifth == nullptr ? 0 : (fifth[i] >> run & 1) << 4;
      values[32 * run + i] = factor * static_cast<float>((own[i] >> shift & 15) | bit) - least;
    }
  }
}

void q4_k(const uint8_t *block, float *values) { k_runs(block, nullptr, block + 16, values); }
void q5_k(const uint8_t *block, float *values) { k_runs(block, block + 16, block + 48, values); }

void q6_k(const uint8_t *block, float *values) {
  const float d = half_at(block + 208);
  for (int run = 0; run < 8; ++run) {
    // Two parts of four quarters of 32 numbers.
    const int part = run / 4, quarter = run % 4;
    const uint8_t *low = block + 64 * part + 32 * (quarter % 2), *high = block + 128 + 32 * part;
    for (int side = 0; side < 2; ++side) {
      const float factor = d * static_cast<float>(static_cast<int8_t>(block[192 + 2 * run + side]));
      for (int i = 16 * side; i < 16 * side + 16; ++i) {
        const int q = (low[i] >> (quarter / 2 * 4) & 15) | (high[i] >> (2 * quarter) & 3) << 4;
        values[32 * run + i] = factor * static_cast<float>(q - 32);
      }
    }
  }
}

Decode loop_of(Type type) {
  switch (type) {
  case Type::q4_0: return q4_0;
  case Type::q4_1: return q4_1;
  case Type::q5_0: return q5_0;
  case Type::q5_1: return q5_1;
  case Type::q8_0: return q8_0;
  case Type::q4_k: return q4_k;
  case Type::q5_k: return q5_k;
  default: return q6_k;
  }
}

// Makes all of `values` from `packed`, on libtorch's threads: its iterator over one element of each block is how code
// that is not compiled with OpenMP reaches them.
template <typename T>
void by_loops(const Tensor &packed, Type type, const Tensor &values) {
  const Size size = size_of(type);
  const Decode decode = loop_of(type);
  const auto firsts = [](const Tensor &all, int64_t width) { return all.view({-1, width}).select(1, 0); };
  const Tensor a = firsts(values, size.numbers), b = firsts(packed, size.bytes);
  auto blocks = at::TensorIteratorConfig()
                    .check_all_same_dtype(false)
                    .resize_outputs(false)
                    .set_check_mem_overlap(false)
                    .add_output(a)
                    .add_const_input(b)
                    .build();
  blocks.for_each(
      [&](char **data, const int64_t *strides, int64_t count) {
        float single[LARGEST];
        for (int64_t i = 0; i < count; ++i) {
          decode(reinterpret_cast<const uint8_t *>(data[1] + i * strides[1]), single);
          T *out = reinterpret_cast<T *>(data[0] + i * strides[0]);
          for (int64_t place = 0; place < size.numbers; ++place) out[place] = static_cast<T>(single[place]);
        }
      },
      /*grain_size=*/65536 / size.numbers);
}

// ---- libtorch's operations, on blocks as rows `[blocks, bytes]`, which give their numbers in f32

// What is worked on at once, in numbers: bounds what the operations need in between.
constexpr int64_t CHUNK = 1 << 22;

Tensor halves(const Tensor &rows, int64_t at) { return rows.narrow(1, at, 2).view(at::kHalf).to(at::kFloat); }
Tensor low(const Tensor &bytes) { return bytes.bitwise_and(15); }
Tensor high(const Tensor &bytes) { return bytes.bitwise_right_shift(4); }
// Nibbles: the low ones first.
Tensor nibbles(const Tensor &bytes) { return at::cat({low(bytes), high(bytes)}, -1); }

// `bits` bits of each byte for each of `count` places, above a nibble's four: [blocks, …, 1, width] to [blocks, …,
// count, width].
Tensor upper_bits(const Tensor &bytes, int64_t count, int64_t bits) {
  const Tensor shifts = at::arange(0, count * bits, bits, bytes.options()).view({count, 1});
  return at::bitwise_right_shift(bytes, shifts).bitwise_and_((1 << bits) - 1).mul_(16);
}

// The fifth bits of 32 numbers, of four bytes: [blocks, 32].
Tensor fifth_bits(const Tensor &bytes) {
  return upper_bits(bytes.unsqueeze(1), 8, 1).transpose(1, 2).reshape({-1, 32});
}

// Eight runs of 32: the factor and the minimum of each are [blocks, 8, 1].
Tensor k_values(const Tensor &rows, const Tensor &q) {
  const Tensor one = rows.narrow(1, 4, 4), two = rows.narrow(1, 8, 4), three = rows.narrow(1, 12, 4);
  const auto runs = [](const Tensor &first, const Tensor &nibble, const Tensor &upper) {
    return at::cat({first.bitwise_and(63), nibble.bitwise_or(upper.bitwise_right_shift(6).mul_(16))}, 1).to(at::kFloat);
  };
  const Tensor factors = runs(one, low(three), one).mul_(halves(rows, 0)),
               least = runs(two, high(three), two).mul_(halves(rows, 2));
  return q.to(at::kFloat).mul_(factors.unsqueeze(2)).sub_(least.unsqueeze(2));
}

// The nibbles of 128 bytes: [blocks, 8, 32].
Tensor k_nibbles(const Tensor &bytes) {
  const Tensor pairs = bytes.reshape({-1, 4, 32});
  return at::stack({low(pairs), high(pairs)}, 2).view({-1, 8, 32});
}

Tensor q6_values(const Tensor &rows) {
  // Two parts of 64 bytes: first the low nibbles of all, then the high ones.
  const Tensor nibble = nibbles(rows.narrow(1, 0, 128).reshape({-1, 2, 64})).view({-1, 2, 4, 32});
  const Tensor upper = upper_bits(rows.narrow(1, 128, 64).reshape({-1, 2, 1, 32}), 4, 2);
  const Tensor factors = rows.narrow(1, 192, 16).view(at::kChar).to(at::kFloat).mul_(halves(rows, 208));
  return nibble.bitwise_or(upper).to(at::kFloat).sub_(32).view({-1, 16, 16}).mul_(factors.unsqueeze(2));
}

Tensor by_operations(const Tensor &rows, Type type) {
  const auto from = [&](int64_t at, int64_t count) { return rows.narrow(1, at, count); };
  switch (type) {
  case Type::q4_0: return nibbles(from(2, 16)).to(at::kFloat).sub_(8).mul_(halves(rows, 0));
  case Type::q4_1: return nibbles(from(4, 16)).to(at::kFloat).mul_(halves(rows, 0)).add_(halves(rows, 2));
  case Type::q5_0:
    return nibbles(from(6, 16)).bitwise_or_(fifth_bits(from(2, 4))).to(at::kFloat).sub_(16).mul_(halves(rows, 0));
  case Type::q5_1:
    return nibbles(from(8, 16))
        .bitwise_or_(fifth_bits(from(4, 4)))
        .to(at::kFloat)
        .mul_(halves(rows, 0))
        .add_(halves(rows, 2));
  case Type::q8_0: return from(2, 32).view(at::kChar).to(at::kFloat).mul_(halves(rows, 0));
  case Type::q4_k: return k_values(rows, k_nibbles(from(16, 128)));
  case Type::q5_k:
    return k_values(rows, k_nibbles(from(48, 128)).bitwise_or_(upper_bits(from(16, 32).unsqueeze(1), 8, 1)));
  default: return q6_values(rows);
  }
}

// ----

Tensor dequantise(const Tensor &packed, Type type, int64_t start, int64_t count, at::ScalarType kind, bool portable) {
  const c10::NoGradGuard no_grad;
  const Size size = size_of(type);
  TORCH_CHECK(start % size.numbers == 0 && count % size.numbers == 0, "blocks come back as a whole, not ", count,
              " numbers from ", start);
  TORCH_CHECK(kind == at::kFloat || kind == at::kHalf || kind == at::kBFloat16,
              "weights in blocks compute in f32, f16 or bf16, not in ", kind);
  const Tensor result = at::empty({count}, packed.options().dtype(kind));
  if (lora::dry::as_on_cuda(packed) && !portable) return result;
  const Tensor own = packed.narrow(0, start / size.numbers * size.bytes, count / size.numbers * size.bytes);
  if (const Kernels *own_kernels = packed.is_cuda() && !portable ? kernels.load() : nullptr) {
    if (done(own_kernels->blocks(own.const_data_ptr(), static_cast<int>(type), static_cast<int>(size.numbers),
                                 static_cast<int>(size.bytes), count, static_cast<int>(kind), result.get_device(),
                                 result.mutable_data_ptr()))) {
      return result;
    }
  }
  if (lora::dry::as_on_cpu(packed) && !portable) {
    if (lora::dry::is_dry(packed)) return result;
    if (kind == at::kFloat) by_loops<float>(own, type, result);
    else if (kind == at::kHalf) by_loops<c10::Half>(own, type, result);
    else by_loops<c10::BFloat16>(own, type, result);
    return result;
  }
  const Tensor rows = own.view({-1, size.bytes}), values = result.view({-1, size.numbers});
  const int64_t step = CHUNK / size.numbers;
  for (int64_t first = 0; first < rows.size(0); first += step) {
    const int64_t length = std::min(step, rows.size(0) - first);
    values.narrow(0, first, length)
        .copy_(by_operations(rows.narrow(0, first, length), type).view({length, size.numbers}));
  }
  return result;
}

} // namespace lora::blocks
