// What kernels ask of the current device, each asked of CUDA once a device: the calls cost microseconds.
#pragma once

#include <cstddef>

namespace moe_infer {

int multiprocessors();
// The GPU code of sm_90a runs here, and only here.
bool is_hopper();
// Lets a kernel have this much dynamic shared memory on the current device.
void allow_shared_memory(void const* kernel, size_t bytes);

}  // namespace moe_infer
