// Grouped GEMM over experts: for each group g, C[rows of g] = A[rows of g] x W_g^T.
//
// A (rows, k) and C (rows, n) are row-major and grouped by expert; W_g is row-major (n, k) in the group's slot. The
// problem sizes lie on the device. Sums are in float32; float32 operands are not rounded to TF32.
// A row's result depends on its own values, on n, k and the type only: not on the other rows or groups.
#pragma once

#include "sublayers/sub_layer.h"

namespace moe_infer {

struct GroupedGemm {
  ExpertGroups groups;
  DataType dtype = DataType::kFloat32;
  int64_t n = 0;
  int64_t k = 0;
  void const* a = nullptr;
  void* c = nullptr;
  uint64_t weight_offset = 0;  // of W in a slot, bytes
  void* workspace = nullptr;
  cudaStream_t stream = nullptr;
};

size_t grouped_gemm_workspace_bytes(int32_t groups);
void grouped_gemm(GroupedGemm const& gemm);

}  // namespace moe_infer
