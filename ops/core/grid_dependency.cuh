// Programmatic dependent launch: a kernel starts while the one before it in the stream still runs, prepares itself, and
// waits before it touches what that one reads or writes. Without the launch attribute (core/launch.h), and before
// Hopper, both functions do nothing.
//
// The rule here: every kernel that is launched so calls wait_for_previous_kernel before start_next_kernel. Then, if the
// previous kernel is of this library, what the one before that wrote may be read without waiting. The previous one may
// be of another library, too, which keeps no such rule: then everything is read after waiting. The one exception is the
// grouped product after a fetch (fetch/copy_experts.cu): it waits for experts one by one instead of for the kernel that
// copies them, which has itself waited for everything before.
#pragma once

namespace moe_infer {

__device__ inline void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel's blocks may start where there is room; it happens when every block of this one has called it.
__device__ inline void start_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace moe_infer
