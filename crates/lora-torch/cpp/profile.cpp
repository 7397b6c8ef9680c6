// Counts what libtorch is asked to do, by the hooks that its own profiler uses: operations that do work themselves, and those
// that make the host wait for the device. Times are not measured here.

#include <ATen/core/function_schema.h>
#include <ATen/core/ivalue.h>
#include <ATen/record_function.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>

#include "guard.h"

namespace lora::profile {

struct Counts {
  uint64_t work = 0, waits = 0;
};

std::mutex mutex;
std::map<std::string, Counts> counts;
at::CallbackHandle active = at::INVALID_CALLBACK_HANDLE;

// An operation while it runs.
struct Frame : at::ObserverContext {
  Frame *outer = nullptr;
  std::string name;
  // It does work, by itself or by what it calls; the latter is what counts then.
  bool works = false, delegates = false;
  bool waits = false;
};

thread_local Frame *innermost = nullptr;

// What gives another view of its input or memory without content, although its schema does not say so; and dropout, which gives
// back its input where it drops nothing and calls what does the work elsewhere. `tools/bench/peft_step.py` has the same list.
constexpr const char *IDLE[] = {"_unsafe_view", "as_strided_", "detach_", "dropout", "empty", "new_empty", "pin_memory", "_pin_memory",
                                "resize", "set_", "squeeze_", "t_", "transpose_", "unsqueeze_"};

// Whether it computes or moves anything: not where it gives another view of its input, memory without content, or a fact
// about a tensor.
bool works(const at::RecordFunction &function, const std::string &name) {
  for (const char *start : IDLE) {
    if (name.rfind(std::string("aten::") + start, 0) == 0) return false;
  }
  const auto schema = function.operator_schema();
  if (!schema) return false;
  if (schema->returns().empty()) return true;
  const auto &first = schema->returns().front();
  if (first.alias_info() != nullptr && !first.alias_info()->isWrite()) return false;
  const auto kind = first.type()->kind();
  return kind == c10::TypeKind::TensorType || kind == c10::TypeKind::ListType;
}

// A number that is read from a tensor on the CPU counts, as it would wait were the tensor elsewhere: unless the reader is itself
// an operation for the CPU.
bool waits(const at::RecordFunction &function, const std::string &name) {
  const auto inputs = function.inputs();
  if (name == "aten::_local_scalar_dense") {
    const bool on_cpu = !inputs.empty() && inputs[0].isTensor() && inputs[0].toTensor().is_cpu();
    return !on_cpu || innermost == nullptr || (innermost->name == "aten::item" && innermost->outer == nullptr);
  }
  if (name == "aten::equal" || name == "aten::nonzero" || name == "aten::_linalg_check_errors") return true;
  if (name != "aten::copy_") return false;
  if (inputs.size() < 3 || !inputs[0].isTensor() || !inputs[1].isTensor() || !inputs[2].isBool()) return false;
  return inputs[0].toTensor().device() != inputs[1].toTensor().device() && !inputs[2].toBool();
}

// Inputs can be looked at here only.
std::unique_ptr<at::ObserverContext> begin(const at::RecordFunction &function) {
  auto frame = std::make_unique<Frame>();
  frame->name = function.name();
  frame->waits = waits(function, frame->name);
  frame->works = frame->waits || works(function, frame->name);
  frame->outer = innermost;
  innermost = frame.get();
  return frame;
}

void end(const at::RecordFunction &, at::ObserverContext *context) {
  Frame *frame = static_cast<Frame *>(context);
  innermost = frame->outer;
  if (innermost != nullptr && (frame->works || frame->delegates)) innermost->delegates = true;
  if (!frame->works || frame->delegates) return;
  const std::lock_guard<std::mutex> guard(mutex);
  Counts &own = counts[frame->name];
  own.work += 1;
  own.waits += frame->waits;
}

extern "C" {

// Begins to count, on this thread and on those that compute its gradients, to which libtorch hands its hooks: what other threads
// of the program do is none of it. Not while it is counting already.
int lora_profile_start() {
  return lora::guarded([&] {
    {
      const std::lock_guard<std::mutex> guard(mutex);
      counts.clear();
    }
    active = at::addThreadLocalCallback(at::RecordFunctionCallback(begin, end).needsInputs(true).scopes({at::RecordScope::FUNCTION}));
  });
}

// Ends it, on the same thread: lines of a name, how often it did work and how often the host waited. Valid until this thread's
// next call.
const char *lora_profile_stop() {
  thread_local std::string text;
  text.clear();
  try {
    at::removeCallback(active);
    const std::lock_guard<std::mutex> guard(mutex);
    std::ostringstream lines;
    for (const auto &[name, own] : counts) lines << name << ' ' << own.work << ' ' << own.waits << '\n';
    text = lines.str();
  } catch (const std::exception &) {
    // Nothing was counted, then.
  }
  return text.c_str();
}

} // extern "C"

} // namespace lora::profile
