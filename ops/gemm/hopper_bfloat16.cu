#include "gemm/hopper_launch.cuh"

namespace moe_infer::hopper {

void launch_bfloat16(Launch const& launch, Product const& product) {
  launch_type<__nv_bfloat16, false>(launch, product);
}

}  // namespace moe_infer::hopper
