// Ranks that train together, over libtorch's own c10d: a TCPStore for small bytes, Gloo for sums in host memory, and a place for
// the backend of GPUs, which `cpp/cuda/nccl.cpp` makes. Who comes, what is said and how failures are worded is not here: see
// `src/group.rs`.

#ifndef USE_C10D_GLOO // the header is empty without; libtorch's packages are built so
#define USE_C10D_GLOO
#endif

#include <c10/util/Logging.h>
#include <c10/util/env.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "../guard.h"
#include "group.h"

namespace lora::group {
namespace {

using Bytes = std::vector<uint8_t>;
using Work = c10::intrusive_ptr<c10d::Work>;

std::chrono::milliseconds duration(int64_t milliseconds) { return std::chrono::milliseconds(milliseconds); }

// While one lives, c10d does not write a failure and its stack to the standard error output, beside the error that it throws.
class Quiet {
 public:
  Quiet() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (depth_++ > 0 || c10::utils::has_env("TORCH_CPP_LOG_LEVEL")) return;
    usual_ = FLAGS_caffe2_log_level;
    FLAGS_caffe2_log_level = std::max<int>(usual_, 3); // fatal errors alone
  }

  ~Quiet() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--depth_ == 0 && !c10::utils::has_env("TORCH_CPP_LOG_LEVEL")) FLAGS_caffe2_log_level = usual_;
  }

 private:
  inline static std::mutex mutex_;
  inline static int depth_ = 0, usual_ = 0;
};

template <typename F>
int guarded(F &&body) noexcept {
  const Quiet quiet;
  return lora::guarded(std::forward<F>(body));
}

// What this thread read last.
Bytes &last_value() {
  thread_local Bytes value;
  return value;
}

} // namespace

extern "C" {

// *group = a client of the store at an address, whose keys begin with `prefix`. `listener` is a bound socket that the store is
// then served from, or -1 where another process serves it. Waits at most so long for that one.
int lora_group_open(const char *host, uint16_t port, int listener, int64_t milliseconds, const char *prefix, Group **group) {
  return guarded([&] {
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = listener >= 0;
    if (listener >= 0) options.masterListenFd = listener;
    options.waitWorkers = false; // `src/group.rs` waits, and says who is missing
    options.timeout = duration(milliseconds);
    auto store = c10::make_intrusive<c10d::TCPStore>(host, options);
    *group = new Group{c10::make_intrusive<c10d::PrefixStore>(prefix, std::move(store)), {}, {}};
  });
}

int lora_group_set(Group *group, const char *key, const uint8_t *bytes, size_t count) {
  return guarded([&] { group->store->set(key, Bytes(bytes, bytes + count)); });
}

int lora_group_append(Group *group, const char *key, const uint8_t *bytes, size_t count) {
  return guarded([&] { group->store->append(key, Bytes(bytes, bytes + count)); });
}

// *sum = a counter of the store, by so much more.
int lora_group_add(Group *group, const char *key, int64_t by, int64_t *sum) {
  return guarded([&] { *sum = group->store->add(key, by); });
}

int lora_group_delete(Group *group, const char *key) {
  return guarded([&] { group->store->deleteKey(key); });
}

// bytes[..count] = what is under a key, until this thread's next call; null where nothing is. Does not wait.
int lora_group_get(Group *group, const char *key, const uint8_t **bytes, size_t *count) {
  return guarded([&] {
    *bytes = nullptr;
    if (!group->store->check({key})) return;
    last_value() = group->store->get(key);
    last_value().push_back(0); // so that there is a pointer to no bytes too
    *bytes = last_value().data();
    *count = last_value().size() - 1;
  });
}

// Connects every rank with every other, in host memory. `host` is the address that this one listens on; null where variables
// of Gloo's own choose.
int lora_group_connect(Group *group, const char *host, int rank, int ranks, int64_t milliseconds) {
  return guarded([&] {
    using Gloo = c10d::ProcessGroupGloo;
    auto options = host ? Gloo::Options::create() : Gloo::Options::create_default();
    if (host) options->devices.push_back(Gloo::createDeviceForHostname(host));
    options->timeout = duration(milliseconds);
    auto store = c10::make_intrusive<c10d::PrefixStore>("gloo", group->store);
    group->host = c10::make_intrusive<Gloo>(std::move(store), rank, ranks, std::move(options));
  });
}

// *work = a sum of a tensor over all ranks, under way. A tensor of a GPU needs the backend of GPUs.
int lora_group_sum(Group *group, const torch::Tensor *tensor, int64_t milliseconds, Work **work) {
  return guarded([&] {
    const auto &backend = tensor->is_cuda() ? group->device : group->host;
    TORCH_CHECK(backend, "these ranks are not connected for tensors on ", tensor->device());
    c10d::AllreduceOptions options;
    options.timeout = duration(milliseconds);
    std::vector<at::Tensor> tensors{*tensor};
    *work = new Work(backend->allreduce(tensors, options));
  });
}

int lora_group_is_done(Work *work, int *done) {
  return guarded([&] { *done = (*work)->isCompleted(); });
}

// Of what is done: fails as it failed, and has the current stream go on after it.
int lora_group_finish(Work *work) {
  return guarded([&] { (*work)->wait(); });
}

void lora_group_drop_work(Work *work) {
  guarded([&] { delete work; });
}

// Ends what a GPU waits for. What is under way in host memory cannot be ended: it stays until its own limit.
int lora_group_abort(Group *group) {
  return guarded([&] {
    if (group->device) group->device->abort();
  });
}

// `abandon` leaves connections as they are, whose end would wait for whatever is under way.
void lora_group_drop(Group *group, int abandon) {
  guarded([&] {
    if (abandon) {
      group->device.release();
      group->host.release();
    }
    delete group;
  });
}

} // extern "C"

} // namespace lora::group
