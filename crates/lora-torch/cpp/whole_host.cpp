// The kernels of cuda/whole.cu on the host, thread by thread: so their arithmetic is held against the other ways to the same
// numbers without a GPU. Tests alone call this.

#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "guard.h"

namespace lora::whole_host {

// What CUDA gives to kernels.
struct Index {
  unsigned x = 0;
};
thread_local Index threadIdx, blockIdx, blockDim;

void __syncthreads() {}
// Without contraction to one operation, which this file is compiled without.
float __fmul_rn(float a, float b) { return a * b; }
float __fadd_rn(float a, float b) { return a + b; }

template <typename To, typename From> To bits_of(From from) {
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
unsigned __float_as_uint(float value) { return bits_of<unsigned>(value); }
float __uint_as_float(unsigned bits) { return bits_of<float>(bits); }
unsigned short as_half(float value) { return c10::detail::fp16_ieee_from_fp32_value(value); }
float of_half(unsigned short bits) { return c10::detail::fp16_ieee_to_fp32_value(bits); }

#define __device__ [[maybe_unused]]
#define __shared__ static thread_local
#define KERNEL [[maybe_unused]]

namespace single {
#define NUMBER float
#define FROM_FLOAT as_float
#define FROM_NUMBER as_float
#include "cuda/whole.cu"
#undef NUMBER
#undef FROM_FLOAT
#undef FROM_NUMBER
} // namespace single

namespace half {
#define NUMBER unsigned short
#define FROM_FLOAT as_half
#define FROM_NUMBER of_half
#include "cuda/whole.cu"
#undef FROM_FLOAT
#undef FROM_NUMBER
} // namespace half

namespace bfloat {
#define FROM_FLOAT as_bfloat
#define FROM_NUMBER of_bfloat
#include "cuda/whole.cu"
} // namespace bfloat

// Runs a kernel's threads in their order, blocks of an odd width, each block twice: in the first round what it shares is not
// complete for all of them.
template <typename F> void threads(int64_t count, F &&kernel) {
  blockDim.x = 37;
  const int64_t all = (count + 7) / 8;
  for (blockIdx.x = 0; blockIdx.x * int64_t{blockDim.x} < all; ++blockIdx.x) {
    for (int round = 0; round < 2; ++round) {
      for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel();
    }
  }
}

extern "C" {

// `parts` are packed, absmax, nested, offset, the dynamic map and the codes; `kind` is 0 for f32, 1 for f16, 2 for bf16.
int lora_host_nf4(const void *const *parts, int64_t count, int kind, void *values) {
  return lora::guarded([&] {
    const auto bytes = [&](int part) { return static_cast<const unsigned char *>(parts[part]); };
    const auto floats = [&](int part) { return static_cast<const float *>(parts[part]); };
    const auto run = [&](auto kernel, auto *values) {
      threads(count, [&] { kernel(bytes(0), bytes(1), floats(2), floats(3), floats(4), floats(5), 0, count, values); });
    };
    if (kind == 0) return run(single::nf4, static_cast<float *>(values));
    run(kind == 1 ? half::nf4 : bfloat::nf4, static_cast<unsigned short *>(values));
  });
}

int lora_host_scaled(const void *bytes, int fp8, const float *scale, int64_t row, int64_t count, int kind, void *values) {
  return lora::guarded([&] {
    const auto run = [&](auto kernel, auto *values) {
      threads(count, [&] {
        kernel(static_cast<const unsigned char *>(bytes), scale, static_cast<unsigned>(row), count, values);
      });
    };
    if (kind == 0) return run(fp8 ? single::fp8 : single::int8, static_cast<float *>(values));
    if (kind == 1) return run(fp8 ? half::fp8 : half::int8, static_cast<unsigned short *>(values));
    run(fp8 ? bfloat::fp8 : bfloat::int8, static_cast<unsigned short *>(values));
  });
}

// `type` is GGUF's number of the blocks, which are of `numbers` numbers in `size` bytes each.
int lora_host_blocks(const void *packed, int type, int numbers, int size, int64_t count, int kind, void *values) {
  return lora::guarded([&] {
    const auto run = [&](auto kernel, auto *values) {
      threads(count, [&] { kernel(static_cast<const unsigned char *>(packed), type, numbers, size, count, values); });
    };
    if (kind == 0) return run(single::gguf_blocks, static_cast<float *>(values));
    run(kind == 1 ? half::gguf_blocks : bfloat::gguf_blocks, static_cast<unsigned short *>(values));
  });
}

} // extern "C"

} // namespace lora::whole_host

#undef __device__
#undef __shared__
#undef KERNEL
#undef NUMBER
#undef FROM_FLOAT
#undef FROM_NUMBER
