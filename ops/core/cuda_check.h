// Every CUDA call goes through MOE_CUDA_CHECK; every launch is followed by MOE_CUDA_CHECK(cudaGetLastError()).
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "core/error.h"

namespace moe_infer {

inline void cuda_check(cudaError_t status, char const* call, char const* file, int line) {
  if (status != cudaSuccess) {
    throw Error(MOE_INFER_CUDA, std::string("CUDA: ") + cudaGetErrorString(status) + " from " + call + " (" + file +
                                    ":" + std::to_string(line) + ")");
  }
}

}  // namespace moe_infer

#define MOE_CUDA_CHECK(call) ::moe_infer::cuda_check((call), #call, __FILE__, __LINE__)
