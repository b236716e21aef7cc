// Copying rows in the widest unit that their size and addresses allow.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace moe_infer {

inline bool aligned_to(void const* a, size_t bytes) { return reinterpret_cast<uintptr_t>(a) % bytes == 0; }

// Calls f(unit, units in a row).
template <class F>
void with_row_unit(void const* a, void const* b, size_t row_bytes, F&& f) {
  if (row_bytes % 16 == 0 && aligned_to(a, 16) && aligned_to(b, 16)) {
    f(uint4{}, static_cast<int64_t>(row_bytes / 16));
  } else {  // every element type has 2 or 4 bytes
    f(uint16_t{}, static_cast<int64_t>(row_bytes / 2));
  }
}

// Threads of a block that walks over one row.
inline unsigned row_threads(int64_t columns) {
  return columns >= 256 ? 256U : static_cast<unsigned>((columns + 31) / 32 * 32);
}

}  // namespace moe_infer
