#include "gemm/hopper_launch.cuh"

namespace moe_infer::hopper {

void launch_float16_gated(Launch const& launch, Product const& product) { launch_type<__half, true>(launch, product); }

}  // namespace moe_infer::hopper
