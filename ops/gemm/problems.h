// The arrays that describe a grouped GEMM to CUTLASS, one entry a group, on the device.
#pragma once

#include "gemm/grouped_gemm.h"

namespace moe_infer {

// Layout of cutlass::gemm::GemmCoord, so that this header needs no CUTLASS.
struct ProblemSize {
  int32_t m, n, k;
};

struct Problems {
  ProblemSize* sizes = nullptr;
  void** a = nullptr;
  void** w = nullptr;
  void** c = nullptr;
  int64_t* stride_k = nullptr;  // leading dimension of A and W
  int64_t* stride_n = nullptr;  // leading dimension of C

  // Sizes and slices the workspace; with base == nullptr only the size is computed.
  static size_t layout(int32_t groups, uint8_t* base, Problems* problems);
};

// Fills the arrays from the groups' rows and slots.
Problems make_problems(GroupedGemm const& gemm);

// One file an instance.
void grouped_gemm_float32(GroupedGemm const& gemm, Problems const& problems);
void grouped_gemm_float16(GroupedGemm const& gemm, Problems const& problems);
void grouped_gemm_bfloat16(GroupedGemm const& gemm, Problems const& problems);
// Any n and k, for the types and sizes that the tensor-core instances do not take.
void grouped_gemm_any(GroupedGemm const& gemm);

}  // namespace moe_infer
