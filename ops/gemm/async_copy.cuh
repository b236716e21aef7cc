// Copies from global into shared memory that go on while the thread that asked for them computes (sm_80 and later).
#pragma once

#include <cstdint>

namespace moe_infer {

// 16 bytes, of aligned addresses; zeros, and `source` is not read, unless `valid`. The memory around them will be
// wanted soon, so the L2 cache takes 256 bytes at a time.
__device__ inline void copy_16_async(void* shared, void const* source, bool valid) {
  auto const to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}

// The same with 4 bytes.
__device__ inline void copy_4_async(void* shared, void const* source, bool valid) {
  auto const to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(source), "r"(valid ? 4 : 0) : "memory");
}

// Closes a set: what this thread has asked for since the last one.
__device__ inline void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the last `kOpen` sets of this thread are on their way. Other threads see the rest after a
// barrier.
template <int kOpen>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

}  // namespace moe_infer
