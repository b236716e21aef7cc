// The tensor-core instance for 16-bit types: Ampere's mma, which Hopper runs too.
#pragma once

#include "gemm/cutlass_grouped.cuh"

namespace moe_infer {

// A tile has 64 rows because an expert seldom has many; 16-byte loads need n and k to be multiples of 8.
template <class Element>
using TensorOpGrouped = typename cutlass::gemm::kernel::DefaultGemmGrouped<
    Element, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, 8,     //
    Element, cutlass::layout::ColumnMajor, cutlass::ComplexTransform::kNone, 8,  //
    Element, cutlass::layout::RowMajor, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
    cutlass::gemm::GemmShape<64, 128, 64>, cutlass::gemm::GemmShape<32, 64, 64>, cutlass::gemm::GemmShape<16, 8, 16>,
    cutlass::epilogue::thread::LinearCombination<Element, 8, float, float>,
    cutlass::gemm::threadblock::GemmBatchedIdentityThreadblockSwizzle, 3,
    cutlass::gemm::kernel::GroupScheduleMode::kDeviceOnly>::GemmKernel;

}  // namespace moe_infer
