// Conversions between float and the element types, for kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/data_type.h"
#include "core/error.h"

namespace moe_infer {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Calls f with a value of the C++ type behind `type`.
template <class F>
void with_type(DataType type, F&& f) {
  switch (type) {
    case DataType::kFloat32:
      return f(float{});
    case DataType::kFloat16:
      return f(__half{});
    case DataType::kBFloat16:
      return f(__nv_bfloat16{});
  }
  throw Error(MOE_INFER_INTERNAL, "unknown data type");
}

}  // namespace moe_infer
