#include "gemm/cutlass_grouped.cuh"

namespace moe_infer {

void run_float16_wide(GroupedGemm const& gemm, GroupArrays const& arrays) {
  WideGemm<cutlass::half_t>::run(gemm, arrays);
}

}  // namespace moe_infer
