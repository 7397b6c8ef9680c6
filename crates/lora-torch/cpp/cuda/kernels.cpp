// Kernels of our own, compiled for the device at hand by NVRTC, which libtorch brings along, when the first is asked for: NF4
// made whole in one pass over memory. The numbers are those of nf4.cpp, to the last bit.

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
#include "../nf4.h"

namespace {

// A thread makes eight numbers of four bytes, so that it reads and writes whole words. `FROM_FLOAT` and `T` come from the
// command line.
constexpr const char *SOURCE = R"(
__device__ float as_float(float value) { return value; }

__device__ unsigned short as_half(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// To the nearest, ties to even; weights are finite.
__device__ unsigned short as_bfloat(float value) {
  const unsigned bits = __float_as_uint(value);
  return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

struct alignas(sizeof(T) * 8) Eight { T numbers[8]; };

extern "C" __global__ void nf4(const unsigned char *packed, const unsigned char *absmax, const float *nested, const float *offset,
                               const float *dynamic, const float *code, long long first_block, long long count, T *values) {
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

// The kernel for a dtype on a device, compiled once and never freed.
cudaKernel_t nf4_kernel(int device, at::ScalarType kind) {
  static std::mutex lock;
  static auto *kernels = new std::map<std::pair<int, at::ScalarType>, cudaKernel_t>();
  const std::lock_guard<std::mutex> held(lock);
  const auto known = kernels->find({device, kind});
  if (known != kernels->end()) return known->second;
  int major = 0, minor = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  const char *type = kind == at::kFloat ? "float" : "unsigned short";
  const char *from = kind == at::kFloat ? "as_float" : kind == at::kHalf ? "as_half" : "as_bfloat";
  const std::vector<char> code = Compiler()({
      "--gpu-architecture=sm_" + std::to_string(10 * major + minor),
      std::string("-DT=") + type,
      std::string("-DFROM_FLOAT=") + from,
  });
  cudaLibrary_t library = nullptr;
  cudaKernel_t kernel = nullptr;
  C10_CUDA_CHECK(cudaLibraryLoadData(&library, code.data(), nullptr, nullptr, 0, nullptr, nullptr, 0));
  C10_CUDA_CHECK(cudaLibraryGetKernel(&kernel, library, "nf4"));
  kernels->emplace(std::make_pair(device, kind), kernel);
  return kernel;
}

} // namespace

extern "C" {

// A `lora::nf4::Kernel`: writes `count` numbers of a weight from the block `first_block` on to `values`, of `kind`, on the current stream of its
// device. What `own` points to is there, too, `dynamic` the 8-bit map and `code` the 16 codes in f32.
const char *lora_cuda_nf4(const lora::nf4::Pointers *own, int64_t first_block, int64_t count, int kind, int device,
                          void *values) {
  const int failed = lora::guarded([&] {
    constexpr int64_t THREADS = 256;
    const cudaKernel_t kernel = nf4_kernel(device, static_cast<at::ScalarType>(kind));
    const uint8_t *packed = own->packed + first_block * lora::nf4::BLOCK / 2;
    void *arguments[] = {&packed,
                         const_cast<uint8_t **>(&own->absmax),
                         const_cast<float **>(&own->nested),
                         const_cast<float **>(&own->offset),
                         const_cast<float **>(&own->dynamic),
                         const_cast<float **>(&own->code),
                         &first_block,
                         &count,
                         &values};
    const int64_t threads = (count + 7) / 8;
    const dim3 grid(static_cast<unsigned>((threads + THREADS - 1) / THREADS));
    C10_CUDA_CHECK(cudaLaunchKernel(reinterpret_cast<const void *>(kernel), grid, dim3(THREADS), arguments, 0,
                                    c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device))));
  });
  return failed ? lora::last_error().c_str() : nullptr;
}

} // extern "C"
