// An allocator that counts what libtorch takes from the host: exact bytes alive and at the peak, where the kernel's resident
// set shows pages, caches and other libraries as well. It stands before libtorch's own and is registered on request only.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/alignment.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>

namespace lora::allocations {

std::atomic<int64_t> live{0}, peak{0};

void add(int64_t bytes) {
  const int64_t now = live.fetch_add(bytes, std::memory_order_relaxed) + bytes;
  int64_t most = peak.load(std::memory_order_relaxed);
  while (now > most && !peak.compare_exchange_weak(most, now, std::memory_order_relaxed)) {
  }
}

// The size stands before the memory, as many bytes before as keep it aligned: the context of an allocation has to be the
// memory itself (c10 calls that a simple pointer), so there is no other place for it but a table under a lock.
constexpr size_t HEADER = c10::gAlignment;
static_assert(HEADER >= sizeof(size_t));

c10::Allocator *inner = nullptr;

void release(void *data) {
  if (data == nullptr) return;
  char *block = static_cast<char *>(data) - HEADER;
  size_t bytes;
  std::memcpy(&bytes, block, sizeof bytes);
  live.fetch_sub(static_cast<int64_t>(bytes), std::memory_order_relaxed);
  inner->raw_deallocate(block);
}

struct Counting final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device host(c10::DeviceType::CPU);
    if (bytes == 0) return {nullptr, nullptr, &release, host};
    // A size that overflows is the inner allocator's to refuse.
    const size_t whole = bytes > std::numeric_limits<size_t>::max() - HEADER ? bytes : bytes + HEADER;
    char *block = static_cast<char *>(inner->raw_allocate(whole));
    std::memcpy(block, &bytes, sizeof bytes);
    add(static_cast<int64_t>(bytes));
    return {block + HEADER, block + HEADER, &release, host};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void *to, const void *from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

extern "C" {

// Begins to count, once for the process. 1 if it counts; 0 where another allocator of a higher priority stands, or libtorch's
// own cannot be wrapped.
int lora_allocations_count() {
  static std::once_flag once;
  // Never destroyed: tensors in statics are freed after it would be.
  static Counting *counting = new Counting;
  std::call_once(once, [] {
    c10::Allocator *own = c10::GetCPUAllocator();
    if (own == nullptr || own->raw_deleter() == nullptr) return;
    inner = own;
    c10::SetCPUAllocator(counting, /*priority=*/1);
  });
  return c10::GetCPUAllocator() == counting;
}

void lora_allocations_read(int64_t *now, int64_t *most) {
  *now = live.load(std::memory_order_relaxed);
  *most = peak.load(std::memory_order_relaxed);
}

void lora_allocations_reset_peak() { peak.store(live.load(std::memory_order_relaxed), std::memory_order_relaxed); }

} // extern "C"

} // namespace lora::allocations
