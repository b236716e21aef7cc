// float32 on the FP32 units: products and sums exact to float32, no TF32.
#include "gemm/instances.h"
#include "gemm/simt_launch.cuh"

namespace moe_infer {

void run_float32(GroupedGemm const& gemm, bool narrow, bool aligned) {
  aligned ? simt::run<float, true>(gemm, narrow) : simt::run<float, false>(gemm, narrow);
}

}  // namespace moe_infer
