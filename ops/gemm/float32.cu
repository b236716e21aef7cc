// float32 on the FP32 units: products and sums exact to float32, no TF32. Accesses are of one element, so every size
// and alignment will do.
#include "gemm/cutlass_grouped.cuh"

namespace moe_infer {

void run_float32(GroupedGemm const& gemm, GroupArrays const& arrays) {
  using Kernel = cutlass::gemm::kernel::DefaultGemmGrouped<
      float, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, 1, float, cutlass::layout::ColumnMajor,
      cutlass::ComplexTransform::kNone, 1, float, cutlass::layout::RowMajor, float, cutlass::arch::OpClassSimt,
      cutlass::arch::Sm80, cutlass::gemm::GemmShape<128, 128, 8>, cutlass::gemm::GemmShape<64, 32, 8>,
      cutlass::gemm::GemmShape<1, 1, 1>, ActivatedCombination<float, 1>,
      cutlass::gemm::threadblock::GemmBatchedIdentityThreadblockSwizzle, 4,
      cutlass::gemm::kernel::GroupScheduleMode::kDeviceOnly>::GemmKernel;
  launch_grouped<Kernel>(gemm, arrays, {gemm.activation, has_source(gemm)});
}

}  // namespace moe_infer
