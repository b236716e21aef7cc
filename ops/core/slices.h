// Aligned slices of a workspace. A layout function takes them in one order, with the memory or without it, so that the
// size it returns and the addresses it hands out cannot differ.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moe_infer {

// What every slice begins at a multiple of, given a base that does; cudaMalloc and TensorRT's workspaces begin so.
constexpr size_t kSliceAlignment = 256;

// Bytes rounded up so that a slice behind them begins where it should.
constexpr size_t aligned_size(size_t bytes) {
  return (bytes + kSliceAlignment - 1) / kSliceAlignment * kSliceAlignment;
}

class Slices {
 public:
  // Without a base the slices are null and only their bytes are counted.
  explicit Slices(uint8_t* base) : base_(base) {}

  // The next slice, of `count` elements. One of no elements takes no bytes and begins where the next slice does.
  template <class T>
  T* take(size_t count) {
    T* const slice = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + bytes_);
    bytes_ += aligned_size(count * sizeof(T));
    return slice;
  }

  // Of all slices taken so far.
  size_t bytes() const { return bytes_; }

 private:
  uint8_t* base_;
  size_t bytes_ = 0;
};

}  // namespace moe_infer
