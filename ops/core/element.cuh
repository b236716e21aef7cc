// Device side of DataType: conversion to and from float, vectors of 16 bytes, and the switch from a DataType to a type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/data_type.h"

namespace moe_infer {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest even.
template <class T>
__device__ T from_float(float x);
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

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T value[N];
};

template <class T>
inline constexpr int kPackSize = static_cast<int>(16 / sizeof(T));

inline bool is_aligned(void const* pointer, uint64_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <class T>
struct ElementTag {
  using type = T;
};

// Calls f with the tag of the type: `with_element(dtype, [&](auto tag) { using T = typename decltype(tag)::type; ...
// })`.
template <class F>
void with_element(DataType dtype, F&& f) {
  switch (dtype) {
    case DataType::kFloat32:
      return f(ElementTag<float>{});
    case DataType::kFloat16:
      return f(ElementTag<__half>{});
    case DataType::kBFloat16:
      return f(ElementTag<__nv_bfloat16>{});
  }
}

}  // namespace moe_infer
