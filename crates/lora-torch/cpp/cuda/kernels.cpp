// Kernels of our own, compiled for the device at hand by NVRTC, which libtorch brings along, when the first is asked for:
// weights in few bytes made whole in one pass over memory. The numbers are those of nf4.cpp and of libtorch's operations, to
// the last bit.

#include <ATen/cuda/CUDAGraph.h>
#include <c10/core/ScalarType.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <array>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "../guard.h"
#include "../kernels.h"
#include "../nf4.h"

namespace {

// A thread makes eight numbers of four bytes, so that it reads and writes whole words. `NUMBER`, and how it comes
// from f32 and becomes it, are said on the command line.
constexpr const char *SOURCE = R"(
__device__ float as_float(float value) { return value; }

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

extern "C" __global__ void int8(const unsigned char *bytes, const float *scale, unsigned row, long long count, NUMBER *values) {
  scale_rows(bytes, scale, row, count, values, [](unsigned char byte) { return (float)(signed char)byte; });
}

extern "C" __global__ void fp8(const unsigned char *bytes, const float *scale, unsigned row, long long count, NUMBER *values) {
  scale_rows(bytes, scale, row, count, values, [](unsigned char byte) { return from_fp8(byte); });
}

extern "C" __global__ void nf4(const unsigned char *packed, const unsigned char *absmax, const float *nested, const float *offset,
                               const float *dynamic, const float *code, long long first_block, long long count,
                               NUMBER *values) {
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
)";

// What of NVRTC is used, under its own names: its header is not among those that libtorch needs.
class Compiler {
public:
  Compiler() {
    // A library beside libtorch_cuda that depends on it, so that the one is found that libtorch has.
    Dl_info own{};
    TORCH_CHECK(dladdr(reinterpret_cast<const void *>(&at::cuda::graph_pool_handle), &own) != 0, "libtorch_cuda is not loaded");
    const std::string file = own.dli_fname, folder = file.substr(0, file.rfind('/') + 1);
    library = dlopen((folder + "libcaffe2_nvrtc.so").c_str(), RTLD_NOW | RTLD_LOCAL);
    TORCH_CHECK(library != nullptr, "NVRTC does not load: ", dlerror());
    int (*version)(int *, int *) = nullptr;
    find(version, "nvrtcVersion");
    int major = 0, minor = 0;
    // It opens another library by its bare name, which is beside it, but not always where the loader looks.
    if (version(&major, &minor) == 0 && dladdr(reinterpret_cast<const void *>(version), &own) != 0) {
      const std::string file = own.dli_fname;
      const std::string builtins = "libnvrtc-builtins.so." + std::to_string(major) + "." + std::to_string(minor);
      dlopen((file.substr(0, file.rfind('/') + 1) + builtins).c_str(), RTLD_NOW | RTLD_GLOBAL);
    }
    find(create, "nvrtcCreateProgram");
    find(compile, "nvrtcCompileProgram");
    find(destroy, "nvrtcDestroyProgram");
    find(code_size, "nvrtcGetCUBINSize");
    find(get_code, "nvrtcGetCUBIN");
    find(log_size, "nvrtcGetProgramLogSize");
    find(get_log, "nvrtcGetProgramLog");
  }

  // Machine code.
  std::vector<char> operator()(const std::vector<std::string> &options) const {
    std::vector<const char *> words;
    for (const std::string &option : options) words.push_back(option.c_str());
    void *program = nullptr;
    TORCH_CHECK(create(&program, SOURCE, "lora.cu", 0, nullptr, nullptr) == 0, "NVRTC takes no program");
    const int failed = compile(program, static_cast<int>(words.size()), words.data());
    const auto text = [&](auto size_of, auto get) {
      size_t size = 0;
      std::vector<char> text;
      if (size_of(program, &size) == 0) text.resize(size);
      if (!text.empty()) get(program, text.data());
      return text;
    };
    const std::vector<char> log = text(log_size, get_log), code = failed ? std::vector<char>() : text(code_size, get_code);
    destroy(&program);
    TORCH_CHECK(!code.empty(), "NVRTC: error ", failed, " ", std::string(log.begin(), log.end()));
    return code;
  }

private:
  template <typename F> void find(F *&function, const char *name) {
    function = reinterpret_cast<F *>(dlsym(library, name));
    TORCH_CHECK(function != nullptr, "NVRTC has no ", name);
  }

  void *library;
  int (*create)(void **, const char *, const char *, int, const char *const *, const char *const *);
  int (*compile)(void *, int, const char *const *);
  int (*destroy)(void **);
  int (*code_size)(void *, size_t *), (*get_code)(void *, char *);
  int (*log_size)(void *, size_t *), (*get_log)(void *, char *);
};

struct Kernels {
  cudaKernel_t nf4, int8, fp8;
};

// The kernels for a dtype on a device, compiled once and never freed.
const Kernels &kernels_of(int device, at::ScalarType kind) {
  static std::mutex lock;
  static auto *all = new std::map<std::pair<int, at::ScalarType>, Kernels>();
  const std::lock_guard<std::mutex> held(lock);
  const auto known = all->find({device, kind});
  if (known != all->end()) return known->second;
  int major = 0, minor = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  const std::string name = kind == at::kFloat ? "float" : kind == at::kHalf ? "half" : "bfloat";
  const std::vector<char> code = Compiler()({
      "--gpu-architecture=sm_" + std::to_string(10 * major + minor),
      std::string("-DNUMBER=") + (kind == at::kFloat ? "float" : "unsigned short"),
      "-DFROM_FLOAT=as_" + name,
      "-DFROM_NUMBER=" + (kind == at::kFloat ? "as_float" : "of_" + name),
  });
  cudaLibrary_t library = nullptr;
  C10_CUDA_CHECK(cudaLibraryLoadData(&library, code.data(), nullptr, nullptr, 0, nullptr, nullptr, 0));
  Kernels own{};
  C10_CUDA_CHECK(cudaLibraryGetKernel(&own.nf4, library, "nf4"));
  C10_CUDA_CHECK(cudaLibraryGetKernel(&own.int8, library, "int8"));
  C10_CUDA_CHECK(cudaLibraryGetKernel(&own.fp8, library, "fp8"));
  return all->emplace(std::make_pair(device, kind), own).first->second;
}

// Runs a kernel that makes `count` numbers, eight a thread, on the current stream of a device.
void launch(cudaKernel_t kernel, int device, int64_t count, void **arguments) {
  constexpr int64_t THREADS = 256;
  const int64_t threads = (count + 7) / 8;
  const dim3 grid(static_cast<unsigned>((threads + THREADS - 1) / THREADS));
  C10_CUDA_CHECK(cudaLaunchKernel(reinterpret_cast<const void *>(kernel), grid, dim3(THREADS), arguments, 0,
                                  c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device))));
}

} // namespace

extern "C" {

// As `lora::Kernels` has them.

const char *lora_cuda_nf4(const lora::nf4::Pointers *own, int64_t first_block, int64_t count, int kind, int device,
                          void *values) {
  const int failed = lora::guarded([&] {
    const uint8_t *packed = own->packed + first_block * lora::nf4::BLOCK / 2;
    lora::nf4::Pointers from = *own;
    void *arguments[] = {&packed, &from.absmax, &from.nested, &from.offset, &from.dynamic, &from.code, &first_block, &count, &values};
    launch(kernels_of(device, static_cast<at::ScalarType>(kind)).nf4, device, count, arguments);
  });
  return failed ? lora::last_error().c_str() : nullptr;
}

const char *lora_cuda_scaled(const void *bytes, int fp8, const float *scale, int64_t row, int64_t count, int kind, int device,
                             void *values) {
  const int failed = lora::guarded([&] {
    TORCH_CHECK(count <= INT64_C(0xffffffff), "a weight of ", count, " numbers");
    unsigned width = static_cast<unsigned>(row);
    void *arguments[] = {&bytes, &scale, &width, &count, &values};
    const Kernels &own = kernels_of(device, static_cast<at::ScalarType>(kind));
    launch(fp8 ? own.fp8 : own.int8, device, count, arguments);
  });
  return failed ? lora::last_error().c_str() : nullptr;
}

} // extern "C"
