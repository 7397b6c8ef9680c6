// How failures of libtorch leave C++: a return code, and a text that stays until this thread's next failure. No exception
// crosses into Rust. What the functions do is not here.

#pragma once

#include <c10/util/Exception.h>

#include <exception>
#include <string>
#include <utility>

namespace lora {

// The text of this thread's last failure.
inline std::string &last_error() {
  thread_local std::string text;
  return text;
}

// Runs `body`: 0 if it returns, 2 if memory ran out, 1 for any other failure.
// The order matters: out of memory is a c10::Error, which is a std::exception.
template <typename F>
int guarded(F &&body) noexcept {
  try {
    std::forward<F>(body)();
    return 0;
  } catch (const c10::OutOfMemoryError &error) {
    last_error() = error.what_without_backtrace();
    return 2;
  } catch (const c10::Error &error) {
    last_error() = error.what_without_backtrace();
    return 1;
  } catch (const std::exception &error) {
    last_error() = error.what();
    return 1;
  } catch (...) {
    last_error() = "unknown C++ exception";
    return 1;
  }
}

} // namespace lora
