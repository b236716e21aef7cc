#include "gemm/tensor_op_grouped.cuh"

namespace moe_infer {

void grouped_gemm_float16(GroupedGemm const& gemm, Problems const& problems) {
  run_cutlass_grouped<TensorOpGrouped<cutlass::half_t>>(gemm, problems);
}

}  // namespace moe_infer
