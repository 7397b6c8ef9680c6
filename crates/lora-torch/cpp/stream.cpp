// A stream of one's own on an accelerator, in the place of the default one for a while. Nothing of CUDA is linked.

#include <ATen/DeviceAccelerator.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <map>
#include <mutex>

#include "guard.h"

namespace {

// Makes `stream` the current one of this thread while it lives. Each waits for what the other was given before, so that
// memory may pass from one to the other.
class Scope {
public:
  explicit Scope(const c10::Stream &stream) : before(at::accelerator::getCurrentStream(stream.device_index())), guard(stream) {
    follow(stream, before);
  }

  // Makes `later` wait for what `earlier` was given so far; the host does not wait.
  static void follow(const c10::Stream &later, const c10::Stream &earlier) {
    c10::Event given(earlier.device_type());
    given.record(earlier);
    given.block(later);
  }

  ~Scope() {
    try {
      follow(before, guard.current_stream());
    } catch (const std::exception &) {
      // A device that is gone: the next call on it says so.
    }
  }

private:
  const c10::Stream before;
  const c10::StreamGuard guard;
};

} // namespace

extern "C" {

// A stream of libtorch's, the same one for a device every time, as cuBLAS's workspaces for a stream are never given back; to be
// freed by `lora_stream_drop`.
int lora_stream_new(int64_t device, void **stream) {
  return lora::guarded([&] {
    static std::mutex lock;
    static auto *all = new std::map<int64_t, c10::Stream>();
    const std::lock_guard<std::mutex> held(lock);
    auto known = all->find(device);
    if (known == all->end()) {
      const c10::Device place(c10::kCUDA, static_cast<c10::DeviceIndex>(device));
      const c10::impl::VirtualGuardImpl backend(place.type());
      known = all->emplace(device, backend.getStreamFromGlobalPool(place, /*isHighPriority=*/false)).first;
    }
    *stream = new c10::Stream(known->second);
  });
}

void lora_stream_drop(void *stream) { delete static_cast<c10::Stream *>(stream); }

// Makes a stream this thread's current one until `lora_stream_leave`, which must come from the same thread.
int lora_stream_enter(const void *stream, void **scope) {
  return lora::guarded([&] { *scope = new Scope(*static_cast<const c10::Stream *>(stream)); });
}

void lora_stream_leave(void *scope) { delete static_cast<Scope *>(scope); }

} // extern "C"
