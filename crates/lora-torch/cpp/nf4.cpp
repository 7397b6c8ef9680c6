// NF4 with double quantisation, number for number as bitsandbytes defines it (quantize_4bit with quant_type nf4, blocksize
// 64, compress_statistics): by loops of our own on the CPU, by a kernel of our own on CUDA (cuda/kernels.cpp) and by libtorch's
// operations elsewhere, which the tests hold together. Layers are not here.

#include "nf4.h"

#include <ATen/ATen.h>
#include <ATen/TensorIterator.h>
#include <c10/core/GradMode.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "guard.h"
#include "kernels.h"
#include "dry/dry.h"

namespace lora::nf4 {

namespace {

// Blocks that share a largest of largest magnitudes.
constexpr int64_t NESTED_BLOCK = 256;
// What is worked on at once, in numbers: bounds what libtorch's operations need in between.
constexpr int64_t CHUNK = 1 << 20;
// Keeps the factor of a block of zeros finite; bitsandbytes' number.
constexpr float LEAST = 1e-38f;

// Quantiles of the standard normal distribution, scaled to [-1, 1], zero among them.
constexpr std::array<float, 16> CODE = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// Between two neighbouring codes; what lies on one goes down.
constexpr std::array<float, 15> middles() {
  std::array<float, 15> between{};
  for (size_t i = 0; i < between.size(); ++i) between[i] = (CODE[i] + CODE[i + 1]) / 2;
  return between;
}
constexpr std::array<float, 15> BETWEEN = middles();

// Both numbers of each byte.
constexpr std::array<float, 512> both() {
  std::array<float, 512> pairs{};
  for (size_t byte = 0; byte < 256; ++byte) {
    pairs[2 * byte] = CODE[byte >> 4];
    pairs[2 * byte + 1] = CODE[byte & 15];
  }
  return pairs;
}
alignas(64) constexpr std::array<float, 512> PAIRS = both();

// The signed dynamic 8-bit map (Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", 2015): for each decimal
// exponent from -6 to 0 twice as many fractions as for the one before, and 0 and 1.
at::Tensor dynamic_map() {
  std::vector<at::Tensor> parts;
  for (int exponent = 0; exponent < 7; ++exponent) {
    const at::Tensor edges = at::linspace(0.1, 1, (1 << exponent) + 1, at::kFloat);
    const at::Tensor middle = (edges.slice(0, 0, -1) + edges.slice(0, 1)) / 2;
    const at::Tensor scaled = middle * std::pow(10.0, exponent - 6);
    parts.push_back(scaled);
    parts.push_back(-scaled);
  }
  parts.push_back(at::tensor({0.0f, 1.0f}));
  return std::get<0>(at::cat(parts).sort());
}

} // namespace

// Never freed: a device may be gone when statics are destroyed.
const Tables &tables(at::Device device) {
  static std::mutex lock;
  static auto *all = new std::map<std::string, Tables>();
  const std::lock_guard<std::mutex> held(lock);
  auto [place, fresh] = all->try_emplace(device.str());
  if (fresh) {
    const at::Tensor map = dynamic_map();
    place->second.between = at::tensor(at::ArrayRef<float>(BETWEEN.data(), BETWEEN.size())).to(device);
    place->second.code = at::tensor(at::ArrayRef<float>(CODE.data(), CODE.size())).to(device);
    place->second.pairs = at::tensor(at::ArrayRef<float>(PAIRS.data(), PAIRS.size())).view({256, 2}).to(device);
    place->second.dynamic = map.to(device);
    place->second.dynamic_between = ((map.slice(0, 0, -1) + map.slice(0, 1)) / 2).to(device);
  }
  return place->second;
}

namespace {

// `values` filled up with zeros to whole rows of `width`.
at::Tensor rows_of(const at::Tensor &values, int64_t width) {
  const int64_t missing = (width - values.numel() % width) % width;
  return (missing == 0 ? values : at::constant_pad_nd(values, {0, missing})).view({-1, width});
}

at::Tensor factors(const at::Tensor &most) { return most.clamp_min(LEAST).reciprocal(); }

// Four lanes, which every x86-64 and every ARM of 64 bits has.
using Floats = float __attribute__((vector_size(16)));
using Integers = int32_t __attribute__((vector_size(16)));
constexpr int64_t LANES = 4;

void quantise_block(const float *values, int64_t count, uint8_t *packed, float *most) {
  // Zeros where the block ends early, as a last byte has two halves.
  Floats own[BLOCK / LANES] = {};
  std::memcpy(own, values, count * sizeof(float));
  // Magnitudes order like their bits, and what is not a number comes above all.
  Integers above = {};
  for (const Floats &lane : own) {
    const Integers bits = (Integers)lane & 0x7fffffff;
    above = bits > above ? bits : above;
  }
  int32_t bits = 0;
  for (int64_t i = 0; i < LANES; ++i) bits = std::max<int32_t>(bits, above[i]);
  std::memcpy(most, &bits, sizeof(float));
  const float factor = 1.0f / std::max(*most, LEAST);
  int32_t codes[BLOCK];
  for (int64_t i = 0; i < BLOCK / LANES; ++i) {
    const Floats scaled = own[i] * factor;
    Integers code = {};
    // A comparison that holds is -1.
    for (const float bound : BETWEEN) code -= scaled > bound;
    std::memcpy(&codes[i * LANES], &code, sizeof(code));
  }
  for (int64_t i = 0; i < (count + 1) / 2; ++i) packed[i] = static_cast<uint8_t>(codes[2 * i] << 4 | codes[2 * i + 1]);
}

#if defined(__x86_64__)
// A whole block, eight numbers at once: the scaled codes fill two registers, in which numbers look theirs up. The same products
// as of the pairs below, to the bit.
__attribute__((target("avx2"))) void dequantise_whole_block(const uint8_t *packed, float scale, float *values) {
  const __m256 factor = _mm256_set1_ps(scale);
  const __m256 below = _mm256_mul_ps(_mm256_loadu_ps(&CODE[0]), factor), above = _mm256_mul_ps(_mm256_loadu_ps(&CODE[8]), factor);
  for (int64_t i = 0; i < BLOCK; i += 8) {
    int32_t four;
    std::memcpy(&four, packed + i / 2, sizeof(four));
    const __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    // The upper half of each byte, then the byte itself: a look-up heeds the lowest three bits, the choice the fourth.
    const __m256i codes = _mm256_or_si256(_mm256_srli_epi64(bytes, 4), _mm256_slli_epi64(bytes, 32));
    const __m256 is_above = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
    _mm256_storeu_ps(values + i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(below, codes),
                                                  _mm256_permutevar8x32_ps(above, codes), is_above));
  }
}
#endif

void dequantise_block(const uint8_t *packed, int64_t count, float scale, float *values) {
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2");
  if (has_avx2 && count == BLOCK) return dequantise_whole_block(packed, scale, values);
#endif
  for (int64_t i = 0; i < count / 2; ++i) {
    const float *pair = &PAIRS[2 * packed[i]];
    values[2 * i] = pair[0] * scale;
    values[2 * i + 1] = pair[1] * scale;
  }
  if (count % 2 != 0) values[count - 1] = PAIRS[2 * packed[count / 2]] * scale;
}

// Calls `work(values, packed, most, count)` on each block, whole ones on libtorch's threads: its iterator over one element
// of each is how code that is not compiled with OpenMP reaches them.
template <typename Work>
void each_block(const at::Tensor &values, const at::Tensor &packed, const at::Tensor &most, Work &&work) {
  const int64_t count = values.numel(), whole = count / BLOCK;
  float *value = values.mutable_data_ptr<float>();
  uint8_t *byte = packed.mutable_data_ptr<uint8_t>();
  float *largest = most.mutable_data_ptr<float>();
  if (whole > 0) {
    const auto firsts = [&](const at::Tensor &all, int64_t width) {
      return all.narrow(0, 0, whole * width).view({whole, width}).select(1, 0);
    };
    const at::Tensor a = firsts(values, BLOCK), b = firsts(packed, BLOCK / 2), c = firsts(most, 1);
    auto blocks = at::TensorIteratorConfig()
                      .check_all_same_dtype(false)
                      .resize_outputs(false)
                      .set_check_mem_overlap(false)
                      .add_output(a)
                      .add_output(b)
                      .add_output(c)
                      .build();
    blocks.for_each(
        [&](char **data, const int64_t *strides, int64_t count) {
          for (int64_t i = 0; i < count; ++i)
            work(reinterpret_cast<float *>(data[0] + i * strides[0]), reinterpret_cast<uint8_t *>(data[1] + i * strides[1]),
                 reinterpret_cast<float *>(data[2] + i * strides[2]), BLOCK);
        },
        /*grain_size=*/1024);
  }
  if (count % BLOCK != 0) work(value + whole * BLOCK, byte + whole * BLOCK / 2, largest + whole, count % BLOCK);
}

} // namespace

Quantised quantise(const at::Tensor &weight, bool portable) {
  const c10::NoGradGuard no_grad;
  const auto kind = weight.scalar_type();
  TORCH_CHECK(kind == at::kFloat || kind == at::kHalf || kind == at::kBFloat16, "NF4 is made of f32, f16 or bf16, not of ", kind);
  const at::Tensor flat = weight.reshape(-1);
  const int64_t count = flat.numel(), blocks = (count + BLOCK - 1) / BLOCK;
  TORCH_CHECK(count > 0, "NF4 of a weight without elements");
  const auto options = flat.options().requires_grad(false);
  Quantised own;
  own.packed = at::empty({(count + 1) / 2}, options.dtype(at::kByte));
  const at::Tensor most = at::empty({blocks}, options.dtype(at::kFloat));
  const Tables &table = tables(flat.device());
  for (int64_t start = 0; start < count; start += CHUNK) {
    // Of a dry run's chunks the first is one of the largest.
    if (start > 0 && lora::dry::is_dry(flat)) break;
    const int64_t length = std::min(CHUNK, count - start);
    const at::Tensor values = flat.narrow(0, start, length).to(at::kFloat);
    const at::Tensor packed = own.packed.narrow(0, start / 2, (length + 1) / 2);
    const at::Tensor largest = most.narrow(0, start / BLOCK, (length + BLOCK - 1) / BLOCK);
    if (lora::dry::as_on_cpu(flat) && !portable) {
      if (lora::dry::is_dry(flat)) continue;
      each_block(values, packed, largest, [](float *values, uint8_t *packed, float *most, int64_t count) {
        quantise_block(values, count, packed, most);
      });
      continue;
    }
    const at::Tensor rows = rows_of(values, BLOCK);
    at::Tensor own_most = rows.abs().amax(1);
    largest.copy_(own_most);
    const at::Tensor scaled = rows * factors(own_most).unsqueeze(1);
    const at::Tensor codes = at::bucketize(scaled, table.between, /*out_int32=*/true).to(at::kByte).view({-1, 2});
    packed.copy_((codes.select(1, 0) * 16 + codes.select(1, 1)).narrow(0, 0, packed.numel()));
  }
  own.offset = most.mean();
  const at::Tensor rows = rows_of(most - own.offset, NESTED_BLOCK);
  own.nested = rows.abs().amax(1);
  const at::Tensor scaled = rows * factors(own.nested).unsqueeze(1);
  own.absmax = at::bucketize(scaled, table.dynamic_between, true).to(at::kByte).view(-1).narrow(0, 0, blocks).clone();
  return own;
}

bool by_kernel(const Quantised &own, bool portable) {
  return !portable && ((own.packed.is_cuda() && kernels.load() != nullptr) || lora::dry::as_on_cuda(own.packed));
}

at::Tensor magnitudes(const Quantised &own) {
  const c10::NoGradGuard no_grad;
  const at::Tensor codes = own.absmax.to(at::kInt);
  const at::Tensor scaled = rows_of(tables(codes.device()).dynamic.index_select(0, codes), NESTED_BLOCK);
  return scaled.mul(own.nested.unsqueeze(1)).view(-1).narrow(0, 0, codes.numel()).add_(own.offset);
}

at::Tensor dequantise(const Quantised &own, at::Tensor most, int64_t start, int64_t count, at::ScalarType kind, bool portable) {
  const c10::NoGradGuard no_grad;
  TORCH_CHECK(start % BLOCK == 0, "NF4 comes back from the start of a block on, not from ", start);
  const at::Tensor result = at::empty({count}, own.packed.options().dtype(kind));
  if (lora::dry::as_on_cuda(own.packed) && !portable) return result;
  if (const Kernels *own_kernels = by_kernel(own, portable) ? kernels.load() : nullptr) {
    const Tables &table = tables(result.device());
    const Pointers parts{own.packed.const_data_ptr<uint8_t>(),  own.absmax.const_data_ptr<uint8_t>(),
                         own.nested.const_data_ptr<float>(),    own.offset.const_data_ptr<float>(),
                         table.dynamic.const_data_ptr<float>(), table.code.const_data_ptr<float>()};
    if (done(own_kernels->nf4(&parts, start / BLOCK, count, static_cast<int>(kind), result.get_device(), result.mutable_data_ptr()))) {
      return result;
    }
  }
  if (!most.defined()) most = magnitudes(own);
  const bool loops = lora::dry::as_on_cpu(result) && !portable;
  // Other dtypes are rounded once, from f32, by way of a chunk in f32.
  at::Tensor between;
  if (kind != at::kFloat) between = at::empty({std::min(CHUNK, count)}, result.options().dtype(at::kFloat));
  for (int64_t done = 0; done < count; done += CHUNK) {
    const int64_t length = std::min(CHUNK, count - done), first = start + done;
    const at::Tensor values = result.narrow(0, done, length);
    at::Tensor single = between.defined() ? between.narrow(0, 0, length) : values;
    const at::Tensor packed = own.packed.narrow(0, first / 2, (length + 1) / 2);
    const at::Tensor largest = most.narrow(0, first / BLOCK, (length + BLOCK - 1) / BLOCK);
    if (loops && lora::dry::is_dry(result)) {
    } else if (loops) {
      each_block(single, packed, largest, [](float *values, const uint8_t *packed, const float *most, int64_t count) {
        dequantise_block(packed, count, *most, values);
      });
    } else {
      const at::Tensor pairs = tables(result.device()).pairs.index_select(0, packed.to(at::kInt)).view(-1);
      const at::Tensor rows = rows_of(pairs, BLOCK).mul_(largest.unsqueeze(1));
      single.copy_(rows.view(-1).narrow(0, 0, length));
    }
    if (between.defined()) values.copy_(single);
  }
  return result;
}

} // namespace lora::nf4

extern "C" {

// Writes two new tensors: the 8-bit map and the 16 codes.
int lora_nf4_tables(at::Tensor **out) {
  return lora::guarded([&] {
    const auto &table = lora::nf4::tables(at::kCPU);
    out[0] = new at::Tensor(table.dynamic);
    out[1] = new at::Tensor(table.code);
  });
}

// Writes four new tensors: packed codes, codes of the largest magnitudes, the nested largest magnitudes, the offset.
int lora_nf4_quantise(const at::Tensor *weight, int portable, at::Tensor **out) {
  return lora::guarded([&] {
    const lora::nf4::Quantised own = lora::nf4::quantise(*weight, portable != 0);
    out[0] = new at::Tensor(own.packed);
    out[1] = new at::Tensor(own.absmax);
    out[2] = new at::Tensor(own.nested);
    out[3] = new at::Tensor(own.offset);
  });
}

} // extern "C"
