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

// The copy engine copies; whoever waits for this kernel waits for that.
__global__ void __launch_bounds__(kThreads) await_kernel(FetchTables const tables) {
  wait_for_previous_kernel();
  start_next_kernel();
  int32_t const count = *tables.item_count;
  for (auto i = static_cast<int32_t>(threadIdx.x); i < count; i += kThreads) {
    wait_for_expert(tables.arrivals, tables.items[i].slot, kAllThere);
  }
}

}  // namespace

void copy_experts(ExpertCopy const& copy, bool overlap, cudaStream_t stream) {
  LaunchShape shape;
  shape.threads = kThreads;
  shape.overlap = overlap;
  shape.stream = stream;
  if (copy.blocks == 0) {
    launch(&await_kernel, shape, copy.tables);
  } else {
    shape.blocks = copy.blocks;
    launch(&copy_kernel, shape, copy);
  }
}

}  // namespace moe_infer
