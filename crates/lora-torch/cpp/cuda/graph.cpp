// CUDA graphs: recording the kernels that a stretch of code launches, and launching them again as one.
//
// The files of this folder need CUDA's headers, but neither a toolkit nor a GPU, and libtorch_cuda when they run: they are an
// object of their own, embedded in the library and opened once libtorch_cuda is (`cuda.rs`).

#include <ATen/core/CachingHostAllocator.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>

#include <cstdint>
#include <memory>
#include <utility>

#include "../guard.h"

namespace {

namespace allocator = c10::cuda::CUDACachingAllocator;

// Whether it went well.
template <typename F>
bool tried(F &&body) {
  return lora::guarded(std::forward<F>(body)) == 0;
}

// A graph whose recording may fail. libtorch 2.11 tells its allocators and generator of the end only where all goes
// well (ATen/cuda/CUDAGraph.cpp, `capture_end`). Otherwise the device's allocator never gives cached memory back any
// more, and asks an object that is gone which streams are recorded.
class Graph : public at::cuda::CUDAGraph {
public:
  void begin(at::MempoolId_t pool) {
    orderly(false, [&] { capture_begin(pool, cudaStreamCaptureModeThreadLocal); });
  }

  void end() {
    orderly(true, [&] { capture_end(); });
  }

private:
  template <typename F>
  void orderly(bool begun, F &&step) {
    try {
      std::forward<F>(step)();
    } catch (...) {
      abandon(begun);
      throw;
    }
  }

  // Takes back what a beginning did: all of it, or as far as it came.
  void abandon(bool begun) {
    for (const auto &[generator, increment] : captured_generator_states_) generator->capturing_ = false;
    // What has been recorded to the end gives its pool back by itself.
    if (capture_ended_ || capture_dev_ == UNDEFINED_DEVICE) return;
    const bool on_device = tried([&] { allocator::endAllocateToPool(capture_dev_, mempool_id_); });
    if (begun || on_device) tried([&] { allocator::releasePool(capture_dev_, mempool_id_); });
    auto *host = at::getHostAllocator(at::kCUDA);
    const bool on_host = tried([&] { host->end_allocate_to_pool(mempool_id_); });
    if (begun || on_host) tried([&] { host->release_pool(mempool_id_); });
  }
};

} // namespace

extern "C" {

// Text of this thread's last failure in this object; valid until its next one.
const char *lora_cuda_last_error() { return lora::last_error().c_str(); }

// pool[0..2] = a name for memory that graphs which never run at once may share. Once all of them are gone the name is
// used up: libtorch's host allocator keeps it without users, and takes no new one.
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
    auto own = std::make_unique<Graph>();
    own->begin({pool[0], pool[1]});
    *graph = own.release();
  });
}

// Ends the recording, come what may, and makes it ready to run.
int lora_graph_end(void *graph) {
  return lora::guarded([&] { static_cast<Graph *>(graph)->end(); });
}

// Runs all of it on the current stream.
int lora_graph_replay(void *graph) {
  return lora::guarded([&] { static_cast<Graph *>(graph)->replay(); });
}

void lora_graph_drop(void *graph) {
  lora::guarded([&] { delete static_cast<Graph *>(graph); });
}

} // extern "C"
