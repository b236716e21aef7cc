#include "gemm/cutlass_grouped.cuh"

namespace moe_infer {

void run_bfloat16_narrow(GroupedGemm const& gemm, GroupArrays const& arrays) {
  NarrowGemm<cutlass::bfloat16_t>::run(gemm, arrays);
}

}  // namespace moe_infer
