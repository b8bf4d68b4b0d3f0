// 64-byte aligned memory that grows and is used again: a layer of a small model asks for it
// hundreds of times a second. One per thread (thread_local), so nothing is shared.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace vq {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { release(); }

  // Contents are undefined. Out of memory ends the process, as everywhere in C++ here: a kernel in
  // the middle of its rows has nothing better to do.
  void* at_least(std::size_t bytes) noexcept {
    if (bytes > size_) {
      release();
      size_ = (bytes + 63) / 64 * 64;
      memory_ = ::operator new(size_, kAlignment, std::nothrow);
      if (!memory_) std::abort();
    }
    return memory_;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};

  void release() { ::operator delete(memory_, kAlignment); }

  void* memory_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace vq
