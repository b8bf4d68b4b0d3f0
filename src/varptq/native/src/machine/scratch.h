// 64-byte aligned memory that grows and is used again: a layer of a small model asks for it
// hundreds of times a second. One per thread (thread_local), so nothing is shared.
#pragma once

#include <cstddef>
#include <cstdlib>

namespace vq {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  // Contents are undefined. Out of memory ends the process, as everywhere in C++ here: a kernel in
  // the middle of its rows has nothing better to do.
  void* at_least(std::size_t bytes) noexcept {
    if (bytes > size_) {
      std::free(memory_);
      size_ = (bytes + 63) / 64 * 64;
      memory_ = std::aligned_alloc(64, size_);
      if (!memory_) std::abort();
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace vq
