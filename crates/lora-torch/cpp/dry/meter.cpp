// Counts what tensors without elements would take: the allocator of Meta tensors gives out no memory and remembers sizes. Bytes
// have labels that say what they are for; which number means what is the caller's business.

#include "../guard.h"
#include "../nf4.h"
#include "dry.h"

#include <c10/core/Allocator.h>
#include <torch/types.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <mutex>
#include <unordered_set>

namespace lora::dry {

Plan &plan() {
  static Plan plan;
  return plan;
}

namespace meter {

constexpr int LABELS = 32;
// The label of host memory beside a device, and of what was there before the run.
constexpr int HOST = -1, BEFORE = -2;

struct Block {
  int64_t bytes;
  int label;
};

using Bytes = std::array<int64_t, LABELS>;

// The backward pass runs in threads of its own, so that all of this is the process's.
std::mutex lock;
std::unordered_set<Block *> blocks;
Bytes live{}, at_peak{};
int64_t total = 0, peak = 0, host = 0, host_peak = 0;
int64_t limit = std::numeric_limits<int64_t>::max();
int current = 0;
thread_local bool allocates_on_host = false;

void change(int label, int64_t bytes) {
  if (label == HOST) {
    host += bytes;
    host_peak = std::max(host_peak, host);
    return;
  }
  if (label == BEFORE) return;
  total += bytes;
  live[label] += bytes;
  if (total > peak) {
    peak = total;
    at_peak = live;
  }
}

void release(void *context) {
  auto *block = static_cast<Block *>(context);
  {
    const std::lock_guard<std::mutex> held(lock);
    change(block->label, -block->bytes);
    blocks.erase(block);
  }
  delete block;
}

struct Counting final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    const c10::Device meta(c10::DeviceType::Meta);
    if (size == 0) return {nullptr, nullptr, &release, meta};
    const int64_t unit = plan().unit, bytes = (static_cast<int64_t>(size) + unit - 1) / unit * unit;
    const std::lock_guard<std::mutex> held(lock);
    const bool on_host = allocates_on_host && plays(Platform::Cuda);
    // The words of the real allocators' failures, by which callers know them.
    TORCH_CHECK_WITH(OutOfMemoryError, on_host || bytes <= limit - total, "out of memory in a dry run: tried to allocate ", bytes,
                     " bytes beside ", total, " of ", limit);
    auto *block = new Block{bytes, on_host ? HOST : current};
    blocks.insert(block);
    change(block->label, bytes);
    // No address: what reads elements crashes at once instead of reading nonsense.
    return {nullptr, block, &release, meta};
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void *, const void *, size_t) const override {}
};

void relabel(Block *block, int label) {
  if (block->label < 0) return;
  total -= block->bytes;
  live[block->label] -= block->bytes;
  block->label = label;
  change(label, block->bytes);
}

} // namespace meter

void on_host(bool on) { meter::allocates_on_host = on; }

int set_label(int label) {
  const std::lock_guard<std::mutex> held(meter::lock);
  std::swap(meter::current, label);
  return label;
}

int current_label() {
  const std::lock_guard<std::mutex> held(meter::lock);
  return meter::current;
}

} // namespace lora::dry

extern "C" {

namespace meter = lora::dry::meter;

// Begins a dry run: nothing is counted yet, and there is no limit. NF4's tables, which stay for the process, are no part of it.
int lora_dry_begin(int cuda, int64_t threads, int64_t unit) {
  return lora::guarded([&] {
#ifdef __APPLE__
    TORCH_CHECK(false, "there are no dry runs on macOS, where the name that tch has for their device is a real one");
#endif
    static std::once_flag once;
    std::call_once(once, [] {
      static meter::Counting counting;
      c10::SetAllocator(c10::DeviceType::Meta, &counting, /*priority=*/1);
      lora::dry::register_kernels();
    });
    lora::nf4::tables(lora::dry::device());
    const std::lock_guard<std::mutex> held(meter::lock);
    for (meter::Block *block : meter::blocks) block->label = meter::BEFORE;
    meter::live = {};
    meter::total = meter::host = 0;
    lora::dry::plan() = {cuda != 0 ? lora::dry::Platform::Cuda : lora::dry::Platform::Cpu, threads, unit};
    meter::limit = std::numeric_limits<int64_t>::max();
    meter::current = 0;
    meter::peak = meter::total;
    meter::at_peak = meter::live;
    meter::host_peak = meter::host;
  });
}

// Beyond so many bytes an allocation fails.
void lora_dry_limit(int64_t bytes) {
  const std::lock_guard<std::mutex> held(meter::lock);
  meter::limit = bytes;
}

// What is allocated from now on has this label; gives the one before.
int lora_dry_label(int label) { return lora::dry::set_label(label); }

// All that lives under one label has another from now on.
void lora_dry_relabel_all(int from, int to) {
  const std::lock_guard<std::mutex> held(meter::lock);
  for (meter::Block *block : meter::blocks) {
    if (block->label == from) meter::relabel(block, to);
  }
}

// What tensors take has another label from now on; tensors of other devices are passed over.
void lora_dry_relabel(torch::Tensor **tensors, size_t count, int to) {
  for (size_t i = 0; i < count; ++i) {
    if (!tensors[i]->defined() || !lora::dry::is_dry(*tensors[i])) continue;
    auto *block = static_cast<meter::Block *>(tensors[i]->storage().data_ptr().get_context());
    const std::lock_guard<std::mutex> held(meter::lock);
    if (meter::blocks.count(block) != 0) meter::relabel(block, to);
  }
}

// out[0..LABELS] = bytes by label at the peak since the last reset; then bytes that live now, and the peak of the host's.
void lora_dry_read(int64_t *out) {
  const std::lock_guard<std::mutex> held(meter::lock);
  std::copy(meter::at_peak.begin(), meter::at_peak.end(), out);
  out[meter::LABELS] = meter::total;
  out[meter::LABELS + 1] = meter::host_peak;
}

void lora_dry_reset_peak() {
  const std::lock_guard<std::mutex> held(meter::lock);
  meter::peak = meter::total;
  meter::at_peak = meter::live;
}

} // extern "C"
