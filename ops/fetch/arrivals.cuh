// How a kernel that copies an expert into a slot tells kernels that run beside it that the expert is there.
#pragma once

#include <cstdint>

namespace moe_infer {

// All threads of a block, after they have written a chunk. The block that writes the last one raises the flag.
__device__ inline void publish_chunk(uint32_t* chunks_done, uint32_t chunk_count, uint32_t* there) {
  __threadfence();  // each thread's own writes
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence();
  if (atomicAdd(chunks_done, 1U) == chunk_count - 1) {
    __threadfence();
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(there), "r"(1U) : "memory");
  }
}

// One thread waits; what it reads afterwards is the expert. `there` null: nothing is fetched beside this kernel.
__device__ inline void wait_for_expert(uint32_t const* there, int32_t slot) {
  if (there == nullptr) return;
  uint32_t flag = 0;
  for (;;) {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(flag) : "l"(there + slot) : "memory");
    if (flag != 0) return;
    __nanosleep(100);
  }
}

}  // namespace moe_infer
