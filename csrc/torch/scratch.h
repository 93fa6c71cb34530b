// Memory of a thread that only grows: a call allocates nothing once it has run at its size.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

namespace fastslim {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // `count` elements, not initialised, aligned to a cache line: vectors of weights must not straddle two.
  template <class T> T* get(int64_t count) {
    const int64_t bytes = (count * int64_t(sizeof(T)) + kLine - 1) / kLine * kLine;
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(kLine, size_t(bytes));
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  static constexpr int64_t kLine = 64;
  void* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace fastslim
