// How fast this machine's two ways to copy out of page-locked memory are. They differ from machine to machine: kernels
// were seen to reach 0.63 and 0.92 of the copy engine's speed with the same kind of GPU.
#pragma once

#include <cstdint>

#include "fetch/expert_copy.h"
#include "fetch/host_copy.h"

namespace moe_infer {

// Seconds for a byte; 0: not measured.
struct CopyRates {
  double kernel = 0;
  double engine = 0;
};

// Those of the current device: measured once in the process, for which the first of a layer's experts are copied into
// its slots, if they are enough to tell. Overwrites `copy`'s slots and lists. Some milliseconds; waits for the device.
// Throws Error(MOE_INFER_CUDA).
CopyRates copy_rates(ExpertCopy const& copy, CopySource const& source, int32_t experts, int32_t slots);

}  // namespace moe_infer
