// CUDA graphs: recording the kernels that a stretch of code launches, and launching them again as one.
//
// The files of this folder need CUDA's headers, but neither a toolkit nor a GPU, and libtorch_cuda when they run: they are an
// object of their own, embedded in the library and opened once libtorch_cuda is (`cuda.rs`).

#include <ATen/cuda/CUDAGraph.h>

#include <cstdint>
#include <memory>

#include "../guard.h"

namespace {

using at::cuda::CUDAGraph;

} // namespace

extern "C" {

// Text of this thread's last failure in this object; valid until its next one.
const char *lora_cuda_last_error() { return lora::last_error().c_str(); }

// pool[0..2] = a name for memory that graphs which never run at once may share.
int lora_graph_pool(uint64_t *pool) {
  return lora::guarded([&] {
    const at::cuda::MempoolId_t own = at::cuda::graph_pool_handle();
    pool[0] = own.first;
    pool[1] = own.second;
  });
}

// Begins to record what the current stream, not the default one, is given, by whichever thread: nothing of it runs. Other
// threads may go on with streams of their own. *graph is to be freed by `lora_graph_drop`.
int lora_graph_begin(const uint64_t *pool, void **graph) {
  return lora::guarded([&] {
    auto own = std::make_unique<CUDAGraph>();
    own->capture_begin({pool[0], pool[1]}, cudaStreamCaptureModeThreadLocal);
    *graph = own.release();
  });
}

// Ends the recording and makes it ready to run.
int lora_graph_end(void *graph) {
  return lora::guarded([&] { static_cast<CUDAGraph *>(graph)->capture_end(); });
}

// Runs all of it on the current stream.
int lora_graph_replay(void *graph) {
  return lora::guarded([&] { static_cast<CUDAGraph *>(graph)->replay(); });
}

void lora_graph_drop(void *graph) {
  lora::guarded([&] { delete static_cast<CUDAGraph *>(graph); });
}

} // extern "C"
