// What became of each expert of a cache: how often it was needed, and where it lies.
//
// Written by the one thread that runs the layer, read by any thread at any time: a reader never makes a run wait.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace moe_infer {

class ExpertUse {
 public:
  explicit ExpertUse(int32_t experts)
      : experts_(experts), entries_(std::make_unique<Entry[]>(static_cast<size_t>(experts))) {}

  void needed(int32_t expert) { entries_[static_cast<size_t>(expert)].uses.fetch_add(1, std::memory_order_relaxed); }
  // -1: in no slot any more.
  void lies_in(int32_t expert, int32_t slot) {
    entries_[static_cast<size_t>(expert)].slot.store(slot, std::memory_order_relaxed);
  }

  std::vector<int64_t> uses() const {
    std::vector<int64_t> found;
    found.reserve(static_cast<size_t>(experts_));
    for (int32_t expert = 0; expert < experts_; ++expert) {
      found.push_back(entries_[static_cast<size_t>(expert)].uses.load(std::memory_order_relaxed));
    }
    return found;
  }

  // While a run goes on, an expert that is being replaced may still be shown, or two in the slot.
  std::vector<int32_t> slots() const {
    std::vector<int32_t> found;
    found.reserve(static_cast<size_t>(experts_));
    for (int32_t expert = 0; expert < experts_; ++expert) {
      found.push_back(entries_[static_cast<size_t>(expert)].slot.load(std::memory_order_relaxed));
    }
    return found;
  }

 private:
  struct Entry {
    std::atomic<int64_t> uses{0};
    std::atomic<int32_t> slot{-1};
  };

  int32_t experts_;
  std::unique_ptr<Entry[]> entries_;  // atomics cannot move, so no vector
};

}  // namespace moe_infer
