// The names of Gloo that c10d's header speaks of. libtorch holds Gloo itself, but its packages lack Gloo's headers, and those
// of a Linux distribution are of other years. Here pointers to Gloo's objects are handed on, and nothing of their layout is
// known: what is called is a function that libtorch exports.

#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

namespace gloo {

class Context {
 public:
  void setTimeout(std::chrono::milliseconds timeout);
};

namespace rendezvous {

// The base of a class that c10d's header defines in full and that is never built here.
class Store {
 public:
  virtual ~Store();
  virtual void set(const std::string &key, const std::vector<char> &value) = 0;
  virtual std::vector<char> get(const std::string &key) = 0;
  virtual void wait(const std::vector<std::string> &keys) = 0;
  virtual void wait(const std::vector<std::string> &keys, const std::chrono::milliseconds &timeout) = 0;
};

} // namespace rendezvous

namespace transport {

class Device;

// Complete only because two classes of the header, which are never built here, own one.
class UnboundBuffer {
 public:
  virtual ~UnboundBuffer();
};

} // namespace transport
} // namespace gloo
