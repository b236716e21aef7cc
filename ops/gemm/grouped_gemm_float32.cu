#include "gemm/cutlass_grouped.cuh"

namespace moe_infer {
namespace {

// Exact float32 on the CUDA cores: TF32 would lose 13 bits. One element at a time, so any n and k will do.
using Kernel = typename cutlass::gemm::kernel::DefaultGemmGrouped<
    float, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, 1,     //
    float, cutlass::layout::ColumnMajor, cutlass::ComplexTransform::kNone, 1,  //
    float, cutlass::layout::RowMajor, float, cutlass::arch::OpClassSimt, cutlass::arch::Sm80,
    cutlass::gemm::GemmShape<64, 128, 8>, cutlass::gemm::GemmShape<32, 64, 8>, cutlass::gemm::GemmShape<1, 1, 1>,
    cutlass::epilogue::thread::LinearCombination<float, 1, float, float>,
    cutlass::gemm::threadblock::GemmBatchedIdentityThreadblockSwizzle, 4,
    cutlass::gemm::kernel::GroupScheduleMode::kDeviceOnly>::GemmKernel;

}  // namespace

void grouped_gemm_float32(GroupedGemm const& gemm, Problems const& problems) {
  run_cutlass_grouped<Kernel>(gemm, problems);
}

}  // namespace moe_infer
