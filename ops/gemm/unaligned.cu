// 16-bit products of any size and alignment: one element an access, float32 arithmetic. For layers whose sizes are no
// multiples of 8, which no known model has, and for gated products with a bias before Hopper; it is here so that they
// are right, not fast.
#include "gemm/instances.h"
#include "gemm/simt_launch.cuh"

namespace moe_infer {

void run_unaligned(GroupedGemm const& gemm, bool narrow) {
  gemm.dtype == DataType::kFloat16 ? simt::run<__half, false>(gemm, narrow)
                                   : simt::run<__nv_bfloat16, false>(gemm, narrow);
}

}  // namespace moe_infer
