// In place of ops/fetch/arrivals.cuh on the host: what the block that plans uses of it.
#pragma once

#include <cstdint>

#include "fetch/fetch_tables.h"

namespace moe_infer {

inline uint64_t nanoseconds() {
  static uint64_t time = 0;
  return time += 1000;
}

inline void store_release(uint32_t* address, uint32_t value) { *address = value; }
inline void store_release_to_host(uint32_t* address, uint32_t value) { *address = value; }

}  // namespace moe_infer
