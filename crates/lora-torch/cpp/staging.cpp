// Frozen weights that live in host memory and pass through a ring of device memory, each copied there while the layers
// before it compute. Layers ask in nearly the same order every step, forward and backward, so what was asked for after the
// same layers before is fetched ahead. Nothing waits in the host: copies run on a stream of their own, and events order
// them against the computing one. On the CPU the same happens with plain copies.

#include "staging.h"

#include <ATen/DeviceAccelerator.h>
#include <ATen/ops/empty.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <torch/types.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <utility>

#include "guard.h"
#include "dry/dry.h"

namespace lora::staging {

// What every kernel is content with as the beginning of a tensor, and libtorch's own allocator gives.
constexpr int64_t ALIGNMENT = 512;
// Pinned memory comes in powers of two: weights share chunks of this size, larger ones have their own.
constexpr int64_t CHUNK = 64 << 20;
// How many uses are remembered: several steps of the largest networks.
constexpr size_t REMEMBERED = 1 << 15;
// Uses in a row that must be the same to find the place in an earlier step.
constexpr size_t CONTEXT = 6;

int64_t aligned(int64_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

// Room for two of the largest, so that one is copied while one is in use, and for more of networks of many layers: up to
// six of the largest, which are a language model's layer and half of the next.
int64_t ring_bytes(int64_t all, int64_t largest) {
  return std::min(all, std::max(2 * largest, aligned(std::min(all / 8, 6 * largest))));
}

// The order in which weights are used.
class Order {
public:
  void note(int64_t id) {
    const bool foreseen = place && uses[*place] == id;
    uses.push_back(id);
    place = foreseen ? std::optional<size_t>(*place + 1) : found();
    if (uses.size() > REMEMBERED) {
      const size_t cut = uses.size() / 2;
      uses.erase(uses.begin(), uses.begin() + static_cast<std::ptrdiff_t>(cut));
      place = place && *place >= cut ? std::optional<size_t>(*place - cut) : std::nullopt;
    }
  }

  // The `ahead`-th use to come, if it can be told.
  std::optional<int64_t> next(size_t ahead) const {
    if (!place || *place + ahead >= uses.size()) return {};
    return uses[*place + ahead];
  }

private:
  // One past the latest earlier place where the last uses were the same.
  std::optional<size_t> found() const {
    if (uses.size() <= CONTEXT) return {};
    const auto last = uses.end() - CONTEXT;
    for (auto at = last; at != uses.begin(); --at) {
      if (std::equal(last, uses.end(), at - 1)) return static_cast<size_t>(at - 1 - uses.begin()) + CONTEXT;
    }
    return {};
  }

  std::vector<int64_t> uses;
  // Where in `uses` the next one is foreseen.
  std::optional<size_t> place;
};

struct Member {
  int64_t offset = 0;
  std::vector<int64_t> shape;
  at::ScalarType kind = at::kByte;
  bool defined = false;
};

struct Weight {
  at::Tensor host; // its bytes
  std::vector<Member> parts;
  int64_t bytes = 0;
};

// A piece of the ring with a weight in it.
struct Region {
  int64_t id, start, end;
  // Fetched for a use to come.
  bool expected;
  int users = 0;
  std::shared_ptr<c10::Event> copied, freed;

  bool overlaps(int64_t from, int64_t to) const { return start < to && from < end; }
};

class Ring final : public lora::Staging {
public:
  explicit Ring(c10::Device device) : device(device), label(lora::dry::current_label()) {
    if (!device.is_cpu() && !lora::dry::is_dry(device)) {
      const c10::impl::VirtualGuardImpl backend(device.type());
      copying = backend.getStreamFromGlobalPool(device, /*isHighPriority=*/false);
    }
  }

  // What was fetched ahead may still be on its way: until then nobody else gets the memory.
  ~Ring() override {
    try {
      if (copying && memory.defined()) memory.record_stream(*copying);
    } catch (const std::exception &) {
      // A device that is gone.
    }
  }

  std::vector<at::Tensor> add(const std::vector<at::Tensor> &parts, int64_t *id) override {
    const std::lock_guard<std::mutex> guard(mutex);
    TORCH_CHECK(!memory.defined(), "weights are added before the first is used");
    const torch::NoGradGuard no_grad;
    Weight weight;
    for (const at::Tensor &tensor : parts) {
      Member part;
      if (tensor.defined()) {
        part = {weight.bytes, tensor.sizes().vec(), tensor.scalar_type(), true};
        weight.bytes += aligned(static_cast<int64_t>(tensor.nbytes()));
      }
      weight.parts.push_back(part);
    }
    weight.host = host_memory(weight.bytes);
    std::vector<at::Tensor> packed = views(weight, weight.host);
    for (size_t i = 0; i < parts.size(); ++i) {
      if (parts[i].defined()) packed[i].copy_(parts[i]);
    }
    *id = static_cast<int64_t>(weights.size());
    largest = std::max(largest, weight.bytes);
    all += weight.bytes;
    weights.push_back(std::move(weight));
    return packed;
  }

  std::vector<at::Tensor> acquire(int64_t id) override {
    const std::lock_guard<std::mutex> guard(mutex);
    const torch::NoGradGuard no_grad;
    const Weight &weight = weights.at(static_cast<size_t>(id));
    if (!memory.defined()) open();
    order.note(id);
    Region *region = held(id);
    if (region == nullptr) {
      // What was fetched ahead in another order than this one is not waited for.
      for (Region &other : regions) other.expected = false;
      region = fetch(id, /*force=*/true);
      TORCH_CHECK(region != nullptr, "the weights in use leave no room in the ring for one of ", weight.bytes, " bytes");
    }
    region->expected = false;
    ++region->users;
    if (region->copied) {
      region->copied->block(at::accelerator::getCurrentStream(device.index()));
    }
    std::vector<at::Tensor> given = views(weight, memory.narrow(0, region->start, weight.bytes));
    fetch_ahead();
    return given;
  }

  void release(int64_t id) noexcept override {
    const std::lock_guard<std::mutex> guard(mutex);
    Region *region = held(id);
    if (region == nullptr || region->users == 0) return;
    --region->users;
    if (!copying) return;
    try {
      if (!region->freed) region->freed = std::make_shared<c10::Event>(device.type());
      region->freed->record(at::accelerator::getCurrentStream(device.index()));
    } catch (const std::exception &) {
      // A device that is gone: the next call on it says so. What it would have read is not written over before.
      ++region->users;
    }
  }

  void counts(int64_t *out) const override {
    const std::lock_guard<std::mutex> guard(mutex);
    out[0] = ring_bytes(all, largest);
    out[1] = fetches;
    out[2] = misses;
  }

private:
  void open() {
    // It is taken when the first weight is used, and belongs to the weights all the same.
    const lora::dry::Labelled labelled(label);
    memory = at::empty({ring_bytes(all, largest)}, at::TensorOptions().dtype(at::kByte).device(device));
    if (!copying) return;
    // The allocator may have given what earlier work on the computing stream still reads.
    c10::Event given(device.type());
    given.record(at::accelerator::getCurrentStream(device.index()));
    given.block(*copying);
  }

  at::Tensor host_memory(int64_t bytes) {
    const auto options = at::TensorOptions().dtype(at::kByte);
    if (device.is_cpu()) return at::empty({bytes}, options);
    if (lora::dry::is_dry(device)) {
      const lora::dry::OnHost there;
      return at::empty({bytes}, options.device(device));
    }
    for (auto &[chunk, used] : chunks) {
      if (chunk.numel() - used >= bytes) {
        used += bytes;
        return chunk.narrow(0, used - bytes, bytes);
      }
    }
    const at::Tensor chunk = at::empty({std::max(CHUNK, bytes)}, options.pinned_memory(true));
    chunks.emplace_back(chunk, bytes);
    return chunk.narrow(0, 0, bytes);
  }

  static std::vector<at::Tensor> views(const Weight &weight, const at::Tensor &bytes) {
    std::vector<at::Tensor> all;
    for (const Member &part : weight.parts) {
      if (!part.defined) {
        all.emplace_back();
        continue;
      }
      int64_t size = static_cast<int64_t>(at::elementSize(part.kind));
      for (int64_t side : part.shape) size *= side;
      all.push_back(bytes.narrow(0, part.offset, size).view(part.kind).view(part.shape));
    }
    return all;
  }

  Region *held(int64_t id) {
    for (Region &region : regions) {
      if (region.id == id) return &region;
    }
    return nullptr;
  }

  // Where a weight can be put: going around from the head, the first place where nothing lies that is in use, or without
  // `force` that is to be used soon.
  std::optional<int64_t> place_for(int64_t bytes, bool force) const {
    std::vector<int64_t> starts{head, 0};
    for (const Region &region : regions) starts.push_back(region.end);
    const int64_t round = memory.numel();
    const auto distance = [&](int64_t start) { return (start - head + round) % round; };
    std::sort(starts.begin(), starts.end(), [&](int64_t one, int64_t other) { return distance(one) < distance(other); });
    for (const int64_t start : starts) {
      const auto kept = [&](const Region &region) {
        return region.overlaps(start, start + bytes) && (region.users > 0 || (region.expected && !force));
      };
      if (start + bytes <= round && std::none_of(regions.begin(), regions.end(), kept)) return start;
    }
    return {};
  }

  // Copies a weight into the ring, if there is a place.
  Region *fetch(int64_t id, bool force) {
    const Weight &weight = weights[static_cast<size_t>(id)];
    const auto start = place_for(weight.bytes, force);
    if (!start) return nullptr;
    const int64_t end = *start + weight.bytes;
    Region region{id, *start, end, true, 0, nullptr, nullptr};
    for (auto other = regions.begin(); other != regions.end();) {
      if (!other->overlaps(*start, end)) {
        ++other;
        continue;
      }
      // One that was fetched and never used is still being written to, but by the same stream.
      if (other->freed) other->freed->block(*copying);
      other = regions.erase(other);
    }
    const at::Tensor target = memory.narrow(0, *start, weight.bytes);
    if (copying) {
      const c10::StreamGuard on(*copying);
      target.copy_(weight.host, /*non_blocking=*/true);
      region.copied = std::make_shared<c10::Event>(device.type());
      region.copied->record(*copying);
    } else {
      target.copy_(weight.host);
    }
    head = end;
    ++fetches;
    if (force) ++misses;
    regions.push_back(std::move(region));
    return &regions.back();
  }

  void fetch_ahead() {
    // Further ahead than this nothing is left to fetch: all weights are there.
    const size_t most = 2 * weights.size();
    for (size_t ahead = 0; ahead < most; ++ahead) {
      const auto id = order.next(ahead);
      if (!id) return;
      if (Region *region = held(*id)) {
        region->expected = true;
      } else if (fetch(*id, /*force=*/false) == nullptr) {
        return;
      }
    }
  }

  const c10::Device device;
  // What the ring is for, in a dry run.
  const int label;
  std::optional<c10::Stream> copying;
  mutable std::mutex mutex;
  std::vector<Weight> weights;
  // Pinned memory and how much of each is taken.
  std::vector<std::pair<at::Tensor, int64_t>> chunks;
  int64_t largest = 0, all = 0;
  at::Tensor memory;
  int64_t head = 0;
  std::vector<Region> regions;
  Order order;
  int64_t fetches = 0, misses = 0;
};

using Handle = std::shared_ptr<lora::Staging>;

extern "C" {

// The ring of a device (-1 the CPU, -2 the device without memory), to be freed by `lora_staging_drop`; layers that use it keep it
// alive.
int lora_staging_new(int64_t device, void **staging) {
  return lora::guarded([&] {
    const c10::Device place = device == -2 ? lora::dry::device() : device < 0 ? c10::Device(c10::kCPU) : c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(device));
    *staging = new Handle(std::make_shared<Ring>(place));
  });
}

void lora_staging_drop(void *staging) { delete static_cast<Handle *>(staging); }

// Moves the tensors of a weight, any of which may be null, to host memory: out[i] is a new tensor, or null.
int lora_staging_add(void *staging, const torch::Tensor **parts, size_t count, torch::Tensor **out, int64_t *id) {
  return lora::guarded([&] {
    std::vector<at::Tensor> list;
    for (size_t i = 0; i < count; ++i) list.push_back(parts[i] == nullptr ? at::Tensor() : *parts[i]);
    std::vector<at::Tensor> packed = (*static_cast<Handle *>(staging))->add(list, id);
    for (size_t i = 0; i < count; ++i) out[i] = packed[i].defined() ? new torch::Tensor(std::move(packed[i])) : nullptr;
  });
}

// out[0..3] = bytes of the ring, copies so far, and those of them that were not foreseen.
void lora_staging_counts(const void *staging, int64_t *out) { (*static_cast<const Handle *>(staging))->counts(out); }

} // extern "C"

} // namespace lora::staging
