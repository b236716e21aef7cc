#include "gemm/hopper_launch.cuh"

namespace moe_infer::hopper {

void launch_bfloat16_gated(Launch const& launch, Product const& product) {
  launch_type<__nv_bfloat16, true>(launch, product);
}

}  // namespace moe_infer::hopper
