#include "gemm/hopper_launch.cuh"

namespace moe_infer::hopper {

void launch_float16(Launch const& launch, Product const& product) { launch_type<__half, false>(launch, product); }

}  // namespace moe_infer::hopper
