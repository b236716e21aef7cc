// How whoever copies an expert into a slot tells kernels that run meanwhile that it has come.
#pragma once

#include <cstdint>

#include "fetch/fetch_tables.h"

namespace moe_infer {

__device__ inline uint64_t nanoseconds() {
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}

// All threads of a block, after they have written a chunk. The block that writes the last one raises the flag.
__device__ inline void publish_chunk(uint32_t* chunks_done, uint32_t chunk_count, uint32_t* there) {
  __threadfence();  // each thread's own writes
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence();
  if (atomicAdd(chunks_done, 1U) == chunk_count - 1) {
    __threadfence();
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(there), "r"(kAllThere) : "memory");
  }
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
