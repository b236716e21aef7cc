// In place of ops/gemm/async_copy.cuh on the host: copies land when they are asked for, or when they are waited for.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <vector>

namespace moe_infer {

struct HostCopy {
  void* shared;
  void const* source;
  size_t bytes;
  bool valid;

  void land() const {
    if (valid) {
      std::memcpy(shared, source, bytes);
    } else {
      std::memset(shared, 0, bytes);
    }
  }
};

// Of a thread.
struct HostCopies {
  std::vector<HostCopy> asked;
  std::deque<std::vector<HostCopy>> closed;
};

extern bool copies_land_late;
HostCopies& copies_of_this_thread();

inline void copy_async(HostCopy const& copy) {
  if (reinterpret_cast<uintptr_t>(copy.shared) % copy.bytes != 0 ||
      (copy.valid && reinterpret_cast<uintptr_t>(copy.source) % copy.bytes != 0)) {
    std::fprintf(stderr, "a copy of %zu bytes is not aligned\n", copy.bytes);
    std::abort();
  }
  if (copies_land_late) {
    copies_of_this_thread().asked.push_back(copy);
  } else {
    copy.land();
  }
}

inline void copy_16_async(void* shared, void const* source, bool valid) { copy_async({shared, source, 16, valid}); }
inline void copy_4_async(void* shared, void const* source, bool valid) { copy_async({shared, source, 4, valid}); }

inline void close_copies() {
  auto& copies = copies_of_this_thread();
  copies.closed.push_back(std::move(copies.asked));
  copies.asked.clear();
}

template <int kOpen>
void wait_for_copies() {
  auto& closed = copies_of_this_thread().closed;
  for (; closed.size() > kOpen; closed.pop_front()) {
    for (HostCopy const& copy : closed.front()) copy.land();
  }
}

}  // namespace moe_infer
