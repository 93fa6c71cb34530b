// What the checks share: buffers of exactly the size a kernel may touch, and comparison with naive loops.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <istream>

#include "fastslim/scalar.h"

namespace fastslim {

// Elements by which the next input buffer is too short: --overread proves that the sanitizers look.
extern int64_t missing_elements;

// Random numbers in [-1, 1), the same for the same line of input.
struct Random {
  uint64_t state;
  double next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return double(int64_t(state >> 11)) / double(1ll << 52) - 1;
  }
};

// A heap block of exactly `size` elements; one element past its end is poisoned.
template <class T> class Buffer {
 public:
  explicit Buffer(int64_t size) : size_(size), data_(static_cast<T*>(std::malloc(sizeof(T) * size_t(size)))) {}
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  int64_t size() const { return size_; }
  double operator[](int64_t i) const { return double(to_accumulate(data_[i])); }
  void set(int64_t i, double value) { from_accumulate(Accumulate<T>(value), data_ + i); }
  void fill(double value) {
    for (int64_t i = 0; i < size_; ++i) set(i, value);
  }

 private:
  int64_t size_;
  T* data_;
};

template <class T> struct Input : Buffer<T> {
  Input(int64_t size, Random& random) : Buffer<T>(size - (size > 0 ? missing_elements : 0)) {
    for (int64_t i = 0; i < this->size(); ++i) this->set(i, random.next());
  }
};

// An output starts as NaN: what a kernel forgets to write shows.
template <class T> struct Output : Buffer<T> {
  explicit Output(int64_t size) : Buffer<T>(size) { this->fill(std::nan("")); }
};

template <class T> constexpr double kEpsilon = 1.2e-7;
template <> constexpr double kEpsilon<bfloat16> = 7.9e-3;
template <> constexpr double kEpsilon<double> = 2.3e-16;

// Ends the program unless |got - expected| <= tolerance.
inline void expect_near(const char* what, int64_t index, double got, double expected, double tolerance) {
  if (std::abs(got - expected) <= tolerance) return;
  std::fprintf(stderr, "%s[%lld] is %.9g, expected %.9g within %.2g\n", what, (long long)index, got, expected,
               tolerance);
  std::exit(1);
}

// Calls run over [0, items) in two pieces, as two threads would.
template <class Run> void in_two_pieces(int64_t items, const Run& run) {
  if (items / 3 > 0) run(int64_t(0), items / 3);
  if (items > items / 3) run(items / 3, items);
}

// One check an op: reads its shape, runs every direction, compares.
void check_depthwise_conv2d(const char* dtype, std::istream& line);
void check_batch_norm_act(const char* dtype, std::istream& line);
void check_sandwich_loss(const char* dtype, std::istream& line);
void check_slim_conv2d(const char* dtype, std::istream& line);

}  // namespace fastslim
