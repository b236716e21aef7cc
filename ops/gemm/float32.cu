// float32 on the FP32 units: products and sums exact to float32, no TF32. Accesses are of one element, so every size
// and alignment will do.
#include <algorithm>

#include "gemm/cutlass_grouped.cuh"

namespace moe_infer {
namespace {

// Products that are summed in sequence. The rounding error of such a sum grows with its length: with 16,384 products in
// one sequence some elements are beyond the tolerance (docs/kernels.md). So k is cut into slices of this many, each a
// launch that adds to the output of those before it. Where the cuts are depends on k alone.
constexpr int64_t kSlice = 1024;

using Kernel = cutlass::gemm::kernel::DefaultGemmGrouped<
    float, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, 1, float, cutlass::layout::ColumnMajor,
    cutlass::ComplexTransform::kNone, 1, float, cutlass::layout::RowMajor, float, cutlass::arch::OpClassSimt,
    cutlass::arch::Sm80, cutlass::gemm::GemmShape<128, 128, 8>, cutlass::gemm::GemmShape<64, 32, 8>,
    cutlass::gemm::GemmShape<1, 1, 1>, ActivatedCombination<float, 1>,
    cutlass::gemm::threadblock::GemmBatchedIdentityThreadblockSwizzle, 4,
    cutlass::gemm::kernel::GroupScheduleMode::kDeviceOnly>::GemmKernel;

// The product over columns begin .. begin + kSlice of the input and the weights. The bias or the source is added with
// the first slice, and the activation applied to the whole sum with the last.
GroupedGemm slice_of(GroupedGemm const& gemm, int64_t begin) {
  GroupedGemm slice = gemm;
  slice.k = std::min(kSlice, gemm.k - begin);
  slice.input = static_cast<float const*>(gemm.input) + begin;
  slice.weight_offset += static_cast<uint64_t>(begin) * sizeof(float);
  if (begin > 0) {
    slice.has_bias = false;
    slice.source = gemm.output;
  }
  if (begin + slice.k < gemm.k) slice.activation = Activation::none();
  return slice;
}

}  // namespace

void run_float32(GroupedGemm const& gemm, GroupArrays const& arrays) {
  for (int64_t begin = 0; begin < gemm.k; begin += kSlice) {
    GroupedGemm const slice = slice_of(gemm, begin);
    launch_grouped<Kernel>(slice, gemm.k, arrays, {slice.activation, has_source(slice)});
  }
}

}  // namespace moe_infer
