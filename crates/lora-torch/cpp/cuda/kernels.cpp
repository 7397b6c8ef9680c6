// Kernels of our own, compiled for the device at hand by NVRTC, which libtorch brings along, when the first is asked for:
// weights in few bytes made whole in one pass over memory (whole.cu, which the build script makes a text of).

#include <ATen/cuda/CUDAGraph.h>
#include <c10/core/ScalarType.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
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

constexpr const char *SOURCE =
#include "whole_source.h"
    ;

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
  cudaKernel_t nf4, int8, fp8, blocks;
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
  C10_CUDA_CHECK(cudaLibraryGetKernel(&own.blocks, library, "gguf_blocks"));
  return all->emplace(std::make_pair(device, kind), own).first->second;
}

// Runs a kernel that makes `count` numbers, eight a thread, on the current stream of a device.
void launch(cudaKernel_t kernel, int device, int64_t count, void **arguments) {
  constexpr int64_t THREADS = 256;
  const int64_t threads = (count + 7) / 8;
  // A stream takes kernels of its own device alone.
  const c10::cuda::CUDAGuard on(static_cast<c10::DeviceIndex>(device));
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

const char *lora_cuda_blocks(const void *packed, int type, int numbers, int bytes, int64_t count, int kind, int device,
                             void *values) {
  const int failed = lora::guarded([&] {
    void *arguments[] = {&packed, &type, &numbers, &bytes, &count, &values};
    launch(kernels_of(device, static_cast<at::ScalarType>(kind)).blocks, device, count, arguments);
  });
  return failed ? lora::last_error().c_str() : nullptr;
}

} // extern "C"
