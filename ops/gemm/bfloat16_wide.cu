#include "gemm/cutlass_grouped.cuh"

namespace moe_infer {

void run_bfloat16_wide(GroupedGemm const& gemm, GroupArrays const& arrays) {
  WideGemm<cutlass::bfloat16_t>::run(gemm, arrays);
}

}  // namespace moe_infer
