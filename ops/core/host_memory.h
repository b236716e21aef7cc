// Host memory that holds weights: page-locked parts of it, bounded in the whole process, and room for what was
// inflated.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace moe_infer {

// The bound on page-locked bytes in this process: environment variable MOE_INFER_PINNED_BYTES (a number, with K, M, G
// or T for powers of 1024), by default half of the physical memory. Throws Error(MOE_INFER_INVALID) when it is no
// number.
uint64_t pinned_bytes_limit();

// Page-locked bytes in this process.
uint64_t pinned_bytes_now();

// Addresses [begin, end).
struct HostRange {
  uintptr_t begin = 0;
  uintptr_t end = 0;
  uint64_t bytes() const { return end - begin; }
};

// Zero pages from the operating system, given back in the destructor.
class HostPages {
 public:
  explicit HostPages(uint64_t bytes);
  ~HostPages();
  HostPages(HostPages const&) = delete;
  HostPages& operator=(HostPages const&) = delete;
  uint8_t* data() const { return data_; }

 private:
  uint8_t* data_ = nullptr;
  uint64_t bytes_ = 0;
};

// Addresses without memory behind them, except where some was committed. Touching the others ends the process.
class ReservedPages {
 public:
  explicit ReservedPages(uint64_t bytes);
  ~ReservedPages();
  ReservedPages(ReservedPages const&) = delete;
  ReservedPages& operator=(ReservedPages const&) = delete;
  uint8_t const* data() const { return data_; }
  bool contains(void const* address) const;
  // Puts zero pages behind whole pages of it, or takes away what is there.
  uint8_t* commit(HostRange const& pages);
  void discard(HostRange const& pages) noexcept;

 private:
  uint8_t* data_ = nullptr;
  uint64_t bytes_ = 0;
};

// Grows ranges to whole pages and merges those that touch or share pages; sorted.
std::vector<HostRange> merge_pages(std::vector<HostRange> ranges);

// The page-locked ranges of one weight file. Pages are locked once, whoever needs them; unlocked in the destructor.
// Thread-safe.
class PinnedRanges {
 public:
  PinnedRanges() = default;
  ~PinnedRanges();
  PinnedRanges(PinnedRanges const&) = delete;
  PinnedRanges& operator=(PinnedRanges const&) = delete;

  // Bytes that pin(range) would lock now.
  uint64_t missing_bytes(HostRange const& pages) const;
  // What is done with each range of pages before it is locked, and when locking it failed.
  struct Backing {
    std::function<void(HostRange const&)> fill;
    std::function<void(HostRange const&)> drop;
  };
  // Locks the pages that are not locked yet. False, with the reason in note(), when the bound or CUDA forbids it: then
  // the rest stays as it is, which is slower but works. `backing`: null where the pages are there already.
  bool pin(HostRange const& pages, Backing const* backing);
  // Whether the whole range lies in one locked region, as a single copy by the copy engine needs it.
  bool is_pinned(void const* data, uint64_t bytes) const;
  uint64_t bytes() const;
  std::string note() const;

 private:
  std::vector<HostRange> gaps(HostRange const& pages) const;
  bool pin_gap(HostRange const& gap, Backing const* backing);

  mutable std::mutex mutex_;
  std::map<uintptr_t, uintptr_t> regions_;  // begin to end, disjoint
  std::string note_;
};

}  // namespace moe_infer
