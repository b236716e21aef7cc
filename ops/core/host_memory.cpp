#include "core/host_memory.h"

#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

#include "core/error.h"

namespace moe_infer {
namespace {

constexpr char const* kVariable = "MOE_INFER_PINNED_BYTES";

uint64_t page_bytes() {
  static auto const bytes = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  return bytes;
}

uint64_t physical_bytes() {
  auto const pages = ::sysconf(_SC_PHYS_PAGES);
  return pages <= 0 ? 0 : static_cast<uint64_t>(pages) * page_bytes();
}

// What all files have locked together. Reserved before it is locked, so that two threads cannot pass the bound.
class PinnedBudget {
 public:
  bool reserve(uint64_t bytes) {
    std::lock_guard<std::mutex> const lock(mutex_);
    auto const limit = pinned_bytes_limit();
    if (bytes > limit || used_ > limit - bytes) {
      return false;
    }
    used_ += bytes;
    return true;
  }
  void release(uint64_t bytes) {
    std::lock_guard<std::mutex> const lock(mutex_);
    used_ -= bytes;
  }
  uint64_t used() {
    std::lock_guard<std::mutex> const lock(mutex_);
    return used_;
  }

 private:
  std::mutex mutex_;
  uint64_t used_ = 0;
};

// Never destroyed: sources may be released while the process exits.
PinnedBudget& budget() {
  static auto* const instance = new PinnedBudget;
  return *instance;
}

cudaError_t register_pages(HostRange const& range) {
  auto* const data = reinterpret_cast<void*>(range.begin);  // NOLINT: pages are counted as addresses
  auto const status = ::cudaHostRegister(data, range.bytes(), cudaHostRegisterPortable);
  if (status != cudaSuccess) {
    ::cudaGetLastError();  // handled here: later checks must not see it
  }
  return status;
}

}  // namespace

uint64_t pinned_bytes_limit() {
  char const* const text = std::getenv(kVariable);
  if (text == nullptr || *text == '\0') {
    return physical_bytes() / 2;
  }
  errno = 0;
  char* end = nullptr;
  auto const number = std::strtoull(text, &end, 10);
  std::string const units = "KMGT";
  std::string unit(end);
  if (unit.size() == 2 && (unit[1] == 'B' || unit[1] == 'b')) {
    unit.pop_back();
  }
  auto const place = unit.size() == 1 ? units.find(static_cast<char>(std::toupper(static_cast<unsigned char>(unit[0]))))
                                      : std::string::npos;
  auto const shift = unit.empty() ? 0U : 10U * static_cast<unsigned>(place + 1);
  bool const digit = *text >= '0' && *text <= '9';
  if (!digit || errno != 0 || (!unit.empty() && place == std::string::npos) ||
      number > std::numeric_limits<uint64_t>::max() >> shift) {
    throw invalid(std::string("environment variable ") + kVariable +
                  " must be a number of bytes such as 8G or 512M, got '" + text + "'");
  }
  return number << shift;
}

uint64_t pinned_bytes_now() { return budget().used(); }

HostPages::HostPages(uint64_t bytes) : bytes_(std::max<uint64_t>(bytes, 1)) {
  void* const memory = ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    throw Error(MOE_INFER_INTERNAL,
                "moe_infer: no host memory for " + std::to_string(bytes) +
                    " bytes of weights; lower MOE_INFER_PINNED_BYTES, or store the weights uncompressed");
  }
  data_ = static_cast<uint8_t*>(memory);
}

HostPages::~HostPages() {
  if (data_ != nullptr) {
    ::munmap(data_, bytes_);
  }
}

ReservedPages::ReservedPages(uint64_t bytes) : bytes_(std::max<uint64_t>(bytes, 1)) {
  void* const range = ::mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (range == MAP_FAILED) {
    throw Error(MOE_INFER_INTERNAL, "moe_infer: no " + std::to_string(bytes) +
                                        " addresses for a weight file: " + std::strerror(errno) +
                                        "; raise the limit on the process's address space (ulimit -v)");
  }
  data_ = static_cast<uint8_t*>(range);
}

ReservedPages::~ReservedPages() { ::munmap(data_, bytes_); }

bool ReservedPages::contains(void const* address) const {
  auto const* const byte = static_cast<uint8_t const*>(address);
  return byte >= data_ && byte < data_ + bytes_;
}

uint8_t* ReservedPages::commit(HostRange const& pages) {
  auto* const place = reinterpret_cast<uint8_t*>(pages.begin);  // NOLINT: pages are counted as addresses
  if (::mprotect(place, pages.bytes(), PROT_READ | PROT_WRITE) != 0) {
    throw Error(MOE_INFER_INTERNAL, "moe_infer: no host memory for " + std::to_string(pages.bytes()) +
                                        " bytes of weights: " + std::strerror(errno) + "; lower " + kVariable);
  }
  return place;
}

void ReservedPages::discard(HostRange const& pages) noexcept {
  auto* const place = reinterpret_cast<void*>(pages.begin);  // NOLINT
  ::mmap(place, pages.bytes(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

std::vector<HostRange> merge_pages(std::vector<HostRange> ranges) {
  auto const page = page_bytes();
  for (auto& range : ranges) {
    range.begin = range.begin / page * page;
    range.end = (range.end + page - 1) / page * page;
  }
  std::sort(ranges.begin(), ranges.end(), [](HostRange const& a, HostRange const& b) { return a.begin < b.begin; });
  std::vector<HostRange> merged;
  for (auto const& range : ranges) {
    if (!merged.empty() && range.begin <= merged.back().end) {
      merged.back().end = std::max(merged.back().end, range.end);
    } else {
      merged.push_back(range);
    }
  }
  return merged;
}

PinnedRanges::~PinnedRanges() {
  for (auto const& [begin, end] : regions_) {
    // Fails when the CUDA runtime has already shut down, which unlocked it.
    ::cudaHostUnregister(reinterpret_cast<void*>(begin));  // NOLINT
    budget().release(end - begin);
  }
  if (!regions_.empty()) {
    ::cudaGetLastError();
  }
}

std::vector<HostRange> PinnedRanges::gaps(HostRange const& pages) const {
  std::vector<HostRange> missing;
  auto position = pages.begin;
  for (auto const& [begin, end] : regions_) {
    if (end <= position) {
      continue;
    }
    if (begin >= pages.end) {
      break;
    }
    if (begin > position) {
      missing.push_back({position, begin});
    }
    position = end;
  }
  if (position < pages.end) {
    missing.push_back({position, pages.end});
  }
  return missing;
}

uint64_t PinnedRanges::missing_bytes(HostRange const& pages) const {
  std::lock_guard<std::mutex> const lock(mutex_);
  uint64_t bytes = 0;
  for (auto const& gap : gaps(pages)) {
    bytes += gap.bytes();
  }
  return bytes;
}

bool PinnedRanges::pin(HostRange const& pages, Backing const* backing) {
  std::lock_guard<std::mutex> const lock(mutex_);
  auto const missing = gaps(pages);
  return std::all_of(missing.begin(), missing.end(), [&](HostRange const& gap) { return pin_gap(gap, backing); });
}

bool PinnedRanges::pin_gap(HostRange const& gap, Backing const* backing) {
  if (!budget().reserve(gap.bytes())) {
    note_ = "the bound of " + std::to_string(pinned_bytes_limit()) + " page-locked bytes in this process is reached (" +
            std::to_string(pinned_bytes_now()) + " in use); raise " + kVariable + " to lock more";
    return false;
  }
  auto const undo = [&] {
    if (backing != nullptr) {
      backing->drop(gap);
    }
    budget().release(gap.bytes());
  };
  try {
    if (backing != nullptr) {
      backing->fill(gap);
    }
  } catch (...) {
    undo();
    throw;
  }
  auto const status = register_pages(gap);
  if (status != cudaSuccess) {
    undo();
    note_ = "page-locking " + std::to_string(gap.bytes()) + " bytes failed (" + ::cudaGetErrorString(status) + ")";
    return false;
  }
  try {
    regions_.emplace(gap.begin, gap.end);
  } catch (...) {
    ::cudaHostUnregister(reinterpret_cast<void*>(gap.begin));  // NOLINT
    undo();
    throw;
  }
  return true;
}

bool PinnedRanges::is_pinned(void const* data, uint64_t bytes) const {
  auto const begin = reinterpret_cast<uintptr_t>(data);
  std::lock_guard<std::mutex> const lock(mutex_);
  auto const after = regions_.upper_bound(begin);
  return after != regions_.begin() && begin + bytes <= std::prev(after)->second;
}

uint64_t PinnedRanges::bytes() const {
  std::lock_guard<std::mutex> const lock(mutex_);
  uint64_t bytes = 0;
  for (auto const& [begin, end] : regions_) {
    bytes += end - begin;
  }
  return bytes;
}

std::string PinnedRanges::note() const {
  std::lock_guard<std::mutex> const lock(mutex_);
  return note_;
}

}  // namespace moe_infer
