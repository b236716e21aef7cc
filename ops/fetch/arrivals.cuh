// How whoever copies an expert into a slot tells kernels that run meanwhile that it has come.
#pragma once

#include <cstdint>

#include "fetch/fetch_tables.h"

namespace moe_infer {

constexpr int kCopyLanes = 32;

__device__ inline uint64_t nanoseconds() {
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}

// All threads of a warp, after they have written a chunk: one of `late` chunks that are needed late, or of `first`
// others. The warp that writes the last one of either kind raises the flag.
__device__ inline void publish_chunk(uint64_t* chunks_done, bool is_late, uint32_t first, uint32_t late,
                                     uint32_t* there) {
  __threadfence();  // each thread's own writes
  __syncwarp();
  if (threadIdx.x % kCopyLanes != 0) return;
  __threadfence();
  constexpr uint64_t kOneLate = uint64_t{1} << 32U;
  uint64_t const one = is_late ? kOneLate : 1;
  uint64_t const done = atomicAdd(reinterpret_cast<unsigned long long*>(chunks_done), one) + one;
  bool const all_first = static_cast<uint32_t>(done) == first;
  bool const all_late = static_cast<uint32_t>(done >> 32U) == late;
  uint32_t const flag = all_first && all_late ? kAllThere : all_first && !is_late ? kFirstThere : kNotThere;
  if (flag == kNotThere) return;
  __threadfence();
  // Of two warps the one that raises it higher may come first.
  atomicMax(there, flag);
}

__device__ inline void store_release(uint32_t* address, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
__device__ inline void store_release_to_host(uint32_t* address, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
__device__ inline uint32_t load_acquire(uint32_t const* address) {
  uint32_t value = 0;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// One thread waits until `least` (kFirstThere, kAllThere) of the slot's expert has come; what it reads afterwards is
// the expert.
__device__ inline void wait_for_expert(Arrivals const& arrivals, int32_t slot, uint32_t least) {
  if (arrivals.there == nullptr) return;
  for (bool waited = false;; waited = true) {
    uint32_t flag = 0;
    // Of the system: the flag may be written by a copy engine.
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(flag) : "l"(arrivals.there + slot) : "memory");
    if (flag >= least) {
      if (waited) atomicMax(reinterpret_cast<unsigned long long*>(arrivals.last_wait), nanoseconds());
      return;
    }
    __nanosleep(100);
  }
}

}  // namespace moe_infer
