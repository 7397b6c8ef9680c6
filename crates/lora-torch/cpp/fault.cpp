// Running out of host memory on purpose: an allocator before libtorch's own, of which chosen allocations of one thread
// fail with the words of a real failure. It is put in place by the first request and never otherwise.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <mutex>

namespace lora::fault {

// What is to fail on a thread; allocations are counted from 0 since it was set.
struct Plan {
  bool set = false;
  uint64_t first = 0, count = 0;
  uint64_t bytes = 0; // 0: no limit
  uint64_t seen = 0, failed = 0, largest = 0;
};

thread_local Plan plan;

struct Failing : c10::Allocator {
  explicit Failing(c10::Allocator *inner) : inner(inner) {}

  c10::DataPtr allocate(size_t size) override {
    if (plan.set) {
      const uint64_t number = plan.seen++;
      plan.largest = std::max<uint64_t>(plan.largest, size);
      const bool chosen = number >= plan.first && number - plan.first < plan.count;
      if (chosen || (plan.bytes != 0 && size >= plan.bytes)) {
        ++plan.failed;
        TORCH_CHECK(false, "[injected] DefaultCPUAllocator: can't allocate memory: you tried to allocate ", size, " bytes.");
      }
    }
    return inner->allocate(size);
  }

  // What it gives out is the inner allocator's, to be freed by that one's own function.
  c10::DeleterFnPtr raw_deleter() const override { return inner->raw_deleter(); }
  bool is_simple_data_ptr(const c10::DataPtr &data) const override { return inner->is_simple_data_ptr(data); }
  void copy_data(void *to, const void *from, size_t count) const override { inner->copy_data(to, from, count); }

  c10::Allocator *inner;
};

extern "C" {

// Lets allocations `first` to `first + count` of this thread fail, and all of at least `bytes` where that is not 0.
void lora_fault_set(uint64_t first, uint64_t count, uint64_t bytes) {
  static std::once_flag once;
  std::call_once(once, [] {
    // Its life is the process's: tensors may outlive every other static.
    c10::SetCPUAllocator(new Failing(c10::GetCPUAllocator()), /*priority=*/255);
  });
  plan = Plan{true, first, count, bytes, 0, 0, 0};
}

void lora_fault_clear() { plan = Plan{}; }

void lora_fault_counts(uint64_t *seen, uint64_t *failed, uint64_t *largest) {
  *seen = plan.seen;
  *failed = plan.failed;
  *largest = plan.largest;
}

} // extern "C"

} // namespace lora::fault
