// Functions of the CUDA driver, which the library does not link.
#pragma once

#include <cuda_runtime_api.h>

#include "core/cuda_check.h"

namespace moe_infer {

constexpr unsigned kCuda12 = 12000;

// The function in its form of this version of CUDA; null: the driver has none. Throws Error(MOE_INFER_CUDA).
inline void* driver_function(char const* name, unsigned version = kCuda12) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  MOE_CUDA_CHECK(cudaGetDriverEntryPointByVersion(name, &found, version, cudaEnableDefault, &result));
  return result == cudaDriverEntryPointSuccess ? found : nullptr;
}

}  // namespace moe_infer
