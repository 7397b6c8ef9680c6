// NCCL for the sums of ranks that train together, each on a GPU of its own. What is summed and how failures are told is not
// here: see `src/group.rs`. c10d's header needs NCCL's own, of the very version that libtorch was built with, as it has parts of
// NCCL's in its objects; without it the one function here says so.

#ifdef LORA_NCCL
#ifndef USE_C10D_NCCL // the header is empty without
#define USE_C10D_NCCL
#endif
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

#include <c10/util/Exception.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

#include <cstdint>

#include "../group/group.h"
#include "../guard.h"

extern "C" {

// Gives a group what sums tensors of a GPU. The ranks connect when the first is summed.
int lora_group_nccl(lora::group::Group *group, int rank, int ranks, int64_t device) {
  return lora::guarded([&] {
#ifdef LORA_NCCL
    auto store = c10::make_intrusive<c10d::PrefixStore>("nccl", group->store);
    auto backend = c10::make_intrusive<c10d::ProcessGroupNCCL>(std::move(store), rank, ranks);
    backend->setBoundDeviceId(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(device)));
    group->device = std::move(backend);
#else
    TORCH_CHECK(false, "built without the header of NCCL, which the wheel nvidia-nccl-cu13 brings beside torch");
#endif
  });
}

} // extern "C"
