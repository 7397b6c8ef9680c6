// A stream of one's own on an accelerator, in the place of the default one for a while. Nothing of CUDA is linked.

#include <ATen/DeviceAccelerator.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "guard.h"

namespace lora::stream {

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

// libtorch has so many of a priority on a device.
constexpr int MOST = 32;

// Streams that were given back, as cuBLAS's workspaces for one are never; and how many there are in all.
struct Free {
  std::mutex lock;
  std::map<int64_t, std::pair<int, std::vector<c10::Stream>>> devices;

  static Free &of_all() {
    static auto *free = new Free();
    return *free;
  }
};

extern "C" {

// A stream that nobody else has; to be given back by `lora_stream_drop`.
int lora_stream_new(int64_t device, void **stream) {
  return lora::guarded([&] {
    Free &free = Free::of_all();
    const std::lock_guard<std::mutex> held(free.lock);
    auto &[taken, back] = free.devices[device];
    if (back.empty()) {
      TORCH_CHECK(taken < MOST, "all ", MOST, " streams of their own are in use");
      const c10::Device place(c10::kCUDA, static_cast<c10::DeviceIndex>(device));
      const c10::impl::VirtualGuardImpl backend(place.type());
      // libtorch gives its streams out in turn. Of those of high priority nobody else takes any here.
      back.push_back(backend.getStreamFromGlobalPool(place, /*isHighPriority=*/true));
      ++taken;
    }
    *stream = new c10::Stream(back.back());
    back.pop_back();
  });
}

void lora_stream_drop(void *stream) {
  const std::unique_ptr<c10::Stream> own(static_cast<c10::Stream *>(stream));
  Free &free = Free::of_all();
  const std::lock_guard<std::mutex> held(free.lock);
  free.devices[own->device_index()].second.push_back(*own);
}

// Makes a stream this thread's current one until `lora_stream_leave`, which must come from the same thread.
int lora_stream_enter(const void *stream, void **scope) {
  return lora::guarded([&] { *scope = new Scope(*static_cast<const c10::Stream *>(stream)); });
}

void lora_stream_leave(void *scope) { delete static_cast<Scope *>(scope); }

} // extern "C"

} // namespace lora::stream
