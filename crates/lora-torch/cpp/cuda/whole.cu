// Weights in few bytes made whole in one pass over memory: NF4, GGUF's blocks, and int8 and fp8 with a factor for each
// output. The numbers are those of ../nf4.cpp, ../blocks.cpp and of libtorch's operations, to the last bit. NVRTC
// compiles this for the card at hand (kernels.cpp), and the host's compiler for tests without one (whole_host.cpp).
//
// NUMBER is what a weight is made of, FROM_FLOAT and FROM_NUMBER how it comes from f32 and becomes it. A thread makes
// eight numbers, so that it reads and writes whole words.

#ifdef __CUDACC_RTC__
#define KERNEL extern "C" __global__
#endif

__device__ float as_float(float value) { return value; }

#ifdef __CUDACC_RTC__
__device__ unsigned short as_half(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ float of_half(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
#endif

__device__ float of_bfloat(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }

// To the nearest, ties to even; weights are finite.
__device__ unsigned short as_bfloat(float value) {
  const unsigned bits = __float_as_uint(value);
  return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

struct alignas(sizeof(NUMBER) * 8) Eight { NUMBER numbers[8]; };

__device__ float from_bits(NUMBER bits) { return FROM_NUMBER(bits); }

// e4m3: a sign, four bits of exponent, three of fraction.
__device__ float from_fp8(unsigned char byte) {
  const unsigned exponent = (byte >> 3) & 15u, fraction = byte & 7u;
  const float size = exponent == 0 ? fraction * 0.001953125f : __uint_as_float(((exponent + 120u) << 23) | (fraction << 20));
  return byte & 128u ? -size : size;
}

// Outputs of `row` numbers, each with a factor, which is rounded to NUMBER first.
template <typename F>
__device__ void scale_rows(const unsigned char *bytes, const float *scale, unsigned row, long long count, NUMBER *values,
                           F value_of) {
  const long long start = 8 * (blockIdx.x * (long long)blockDim.x + threadIdx.x);
  if (start >= count) return;
  const auto number = [&](unsigned char byte, unsigned at) {
    return FROM_FLOAT(__fmul_rn(value_of(byte), from_bits(FROM_FLOAT(scale[at / row]))));
  };
  if (start + 8 <= count) {
    const unsigned long long word = *(const unsigned long long *)(bytes + start);
    Eight own;
#pragma unroll
    for (int i = 0; i < 8; ++i) own.numbers[i] = number((unsigned char)(word >> (8 * i)), (unsigned)start + i);
    *(Eight *)(values + start) = own;
    return;
  }
  for (long long i = start; i < count; ++i) values[i] = number(bytes[i], (unsigned)i);
}

KERNEL void int8(const unsigned char *bytes, const float *scale, unsigned row, long long count, NUMBER *values) {
  scale_rows(bytes, scale, row, count, values, [](unsigned char byte) { return (float)(signed char)byte; });
}

KERNEL void fp8(const unsigned char *bytes, const float *scale, unsigned row, long long count, NUMBER *values) {
  scale_rows(bytes, scale, row, count, values, [](unsigned char byte) { return from_fp8(byte); });
}

KERNEL void nf4(const unsigned char *packed, const unsigned char *absmax, const float *nested, const float *offset,
                 const float *dynamic, const float *code, long long first_block, long long count, NUMBER *values) {
  __shared__ float codes[16];
  if (threadIdx.x < 16) codes[threadIdx.x] = code[threadIdx.x];
  __syncthreads();
  const long long start = 8 * (blockIdx.x * (long long)blockDim.x + threadIdx.x);
  if (start >= count) return;
  const long long block = first_block + start / 64;
  const float most = __fadd_rn(__fmul_rn(dynamic[absmax[block]], nested[block / 256]), *offset);
  if (start + 8 <= count) {
    const unsigned word = *(const unsigned *)(packed + start / 2);
    Eight own;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const unsigned byte = (word >> (8 * (i / 2))) & 255u;
      own.numbers[i] = FROM_FLOAT(__fmul_rn(codes[i % 2 == 0 ? byte >> 4 : byte & 15u], most));
    }
    *(Eight *)(values + start) = own;
    return;
  }
  for (long long i = start; i < count; ++i) {
    const unsigned byte = packed[i / 2];
    values[i] = FROM_FLOAT(__fmul_rn(codes[i % 2 == 0 ? byte >> 4 : byte & 15u], most));
  }
}

// ---- GGUF's blocks: what lies where in them, by the number of a type there, is told in ../blocks.cpp

__device__ float half_at(const unsigned char *bytes) { return of_half((unsigned short)(bytes[0] | bytes[1] << 8)); }
__device__ int nibble(const unsigned char *bytes, int i) { return i < 16 ? bytes[i] & 15 : bytes[i - 16] >> 4; }
__device__ int fifth(const unsigned char *bytes, int i) { return (bytes[i / 8] >> (i % 8) & 1) << 4; }

// Q4_K and Q5_K.
__device__ float of_k_run(const unsigned char *b, bool five, int i) {
  const int run = i / 32, at = i % 32;
  const unsigned char *s = b + 4, *low = b + (five ? 48 : 16) + run / 2 * 32;
  const int scale = run < 4 ? s[run] & 63 : (s[run + 4] & 15) | (s[run - 4] >> 6) << 4;
  const int least = run < 4 ? s[run + 4] & 63 : (s[run + 4] >> 4) | (s[run] >> 6) << 4;
  const int q = (low[at] >> (run % 2 * 4) & 15) | (five ? (b[16 + at] >> run & 1) << 4 : 0);
  const float number = __fmul_rn(__fmul_rn(half_at(b), (float)scale), (float)q);
  return __fadd_rn(number, -__fmul_rn(half_at(b + 2), (float)least));
}

__device__ float of_q6_k(const unsigned char *b, int i) {
  const int part = i / 128, quarter = i / 32 % 4, at = i % 32;
  const int low = b[64 * part + 32 * (quarter % 2) + at] >> (quarter / 2 * 4) & 15;
  const int q = low | (b[128 + 32 * part + at] >> (2 * quarter) & 3) << 4;
  return __fmul_rn(__fmul_rn(half_at(b + 208), (float)(signed char)b[192 + i / 16]), (float)(q - 32));
}

__device__ float of_block(int type, const unsigned char *b, int i) {
  switch (type) {
  case 2: return __fmul_rn((float)(nibble(b + 2, i) - 8), half_at(b));
  case 3: return __fadd_rn(__fmul_rn((float)nibble(b + 4, i), half_at(b)), half_at(b + 2));
  case 6: return __fmul_rn((float)((nibble(b + 6, i) | fifth(b + 2, i)) - 16), half_at(b));
  case 7: return __fadd_rn(__fmul_rn((float)(nibble(b + 8, i) | fifth(b + 4, i)), half_at(b)), half_at(b + 2));
  case 8: return __fmul_rn((float)(signed char)b[2 + i], half_at(b));
  case 14: return of_q6_k(b, i);
  default: return of_k_run(b, type == 13, i);
  }
}

// Blocks of `numbers` numbers in `bytes` bytes; `count` is whole blocks.
KERNEL void gguf_blocks(const unsigned char *packed, int type, int numbers, int bytes, long long count, NUMBER *values) {
  const long long start = 8 * (blockIdx.x * (long long)blockDim.x + threadIdx.x);
  if (start >= count) return;
  const unsigned char *block = packed + start / numbers * bytes;
  const int place = (int)(start % numbers);
  Eight own;
#pragma unroll
  for (int i = 0; i < 8; ++i) own.numbers[i] = FROM_FLOAT(of_block(type, block, place + i));
  *(Eight *)(values + start) = own;
}
