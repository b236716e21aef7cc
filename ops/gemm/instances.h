// The kernels behind grouped_gemm, one file each, and the arrays that CUTLASS's grouped kernels read.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "gemm/grouped_gemm.h"

namespace moe_infer {

// Device arrays, one entry a group, in the workspace. Entry layout of `problems`: cutlass::gemm::GemmCoord (m, n, k).
struct GroupArrays {
  int32_t* problems = nullptr;
  void** inputs = nullptr;
  void** weights = nullptr;
  void** sources = nullptr;
  void** outputs = nullptr;
  int64_t* input_strides = nullptr;
  int64_t* weight_strides = nullptr;
  int64_t* source_strides = nullptr;
  int64_t* output_strides = nullptr;

  // Slices `base`; returns the bytes. With base == nullptr only the size is computed.
  static size_t layout(int32_t groups, uint8_t* base, GroupArrays* arrays);
};

// Fills the arrays from the groups.
void fill_group_arrays(GroupedGemm const& gemm, GroupArrays const& arrays);

// Tensor cores, 16-byte aligned operands. Wide: many rows an expert; narrow: few.
void run_float16_wide(GroupedGemm const& gemm, GroupArrays const& arrays);
void run_float16_narrow(GroupedGemm const& gemm, GroupArrays const& arrays);
void run_bfloat16_wide(GroupedGemm const& gemm, GroupArrays const& arrays);
void run_bfloat16_narrow(GroupedGemm const& gemm, GroupArrays const& arrays);
// FP32 units (no TF32), any size and alignment; `aligned`: every row of every operand begins at 16 bytes.
void run_float32(GroupedGemm const& gemm, bool narrow, bool aligned);
// 16-bit types, any size and alignment, biased gates too; not fast.
void run_unaligned(GroupedGemm const& gemm, bool narrow);

}  // namespace moe_infer
