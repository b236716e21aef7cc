// Element types of hidden states and weights.
#pragma once

#include <cstddef>
#include <cstdint>

#include "moe_infer.h"

namespace moe_infer {

enum class DataType : int32_t {
  kFloat32 = MOE_INFER_FLOAT32,
  kFloat16 = MOE_INFER_FLOAT16,
  kBFloat16 = MOE_INFER_BFLOAT16
};

constexpr size_t size_of(DataType type) { return type == DataType::kFloat32 ? 4 : 2; }

constexpr char const* name_of(DataType type) {
  return type == DataType::kFloat32 ? "float32" : type == DataType::kFloat16 ? "float16" : "bfloat16";
}

}  // namespace moe_infer
