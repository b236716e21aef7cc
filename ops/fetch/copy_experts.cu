#include "core/grid_dependency.cuh"
#include "core/launch.h"
#include "fetch/copy_block.cuh"
#include "fetch/fetch_kernels.h"

namespace moe_infer {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) copy_kernel(ExpertCopy const copy) {
  wait_for_previous_kernel();
  start_next_kernel();
  copy_in_block<kThreads>(copy, blockIdx.x);
}

}  // namespace

void copy_experts(ExpertCopy const& copy, bool overlap, cudaStream_t stream) {
  LaunchShape shape;
  shape.blocks = copy.blocks;
  shape.threads = kThreads;
  shape.overlap = overlap;
  shape.stream = stream;
  launch(&copy_kernel, shape, copy);
}

}  // namespace moe_infer
