// The grouped product on Hopper's tensor cores.
//
// Weights are operand A and rows of hidden states operand B: a tensor-core instruction has 64 rows of A but 8 to 256 of
// B in steps, so a tile of few rows costs what its rows cost, and one design serves few tokens and thousands. A
// unit of work is 128 weight rows times up to kTokens rows. Three warpgroups: one warp copies both operands into a ring
// of stages in shared memory (TMA), one warp claims units, and two warpgroups multiply 64 weight rows each, apply bias
// and activation, transpose through shared memory and store whole 16 bytes.
//
// kGated: gate and up rows alternate in memory; the copy engine puts 8 gate rows and then their 8 up rows into a
// stage, whereby a thread's sums hold both (see weights_map in hopper.cu).
//
// kCluster 2: two blocks work on 256 weight rows and the same rows of the input, of which each copies half into both.
#pragma once

#include "core/grid_dependency.cuh"
#include "gemm/hopper_multiplier.cuh"
#include "gemm/hopper_primitives.cuh"
#include "gemm/hopper_producer.cuh"
#include "gemm/hopper_tile.cuh"
#include "gemm/hopper_units.cuh"

namespace moe_infer::hopper {

template <class T, class TileT, bool kGated>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_kernel(__grid_constant__ CUtensorMap const weights, __grid_constant__ CUtensorMap const tokens,
                   __grid_constant__ Product const product) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t raw[];
  auto* const shared = reinterpret_cast<SharedStorage<TileT>*>((reinterpret_cast<uintptr_t>(raw) + 1023) &
                                                               ~static_cast<uintptr_t>(1023));
  int const warp = static_cast<int>(threadIdx.x) / 32;
  bool const first_lane = threadIdx.x % 32 == 0;

  if (threadIdx.x == 0) {
    prefetch_map(weights);
    prefetch_map(tokens);
    for (int i = 0; i < TileT::kStages; ++i) {
      barrier_init(&shared->full[i], 1);
      barrier_init(&shared->empty[i], kMultiplierWarps * TileT::kCluster);
    }
    shared->queue.init((kMultiplierWarps + 1) * TileT::kCluster);
    barrier_init_fence();
  }
  if constexpr (TileT::kCluster > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }

  if (warp < 4) {
    give_registers<40>();
    if (warp == 0 && first_lane) {
      Producer<TileT, kGated>(shared, &weights, &tokens, &product).run();
    } else if (warp == 1 && cluster_rank() == 0) {
      UnitsOfGroups const units{product.groups, TileT::kTokens, TileT::kBoxRows, product.blocks, shared->units_end};
      count_units(product.groups, TileT::kTokens, product.blocks, shared->units_end);
      schedule_units<TileT::kCluster>(&shared->queue, units, product.counters,
                                      static_cast<int32_t>(gridDim.x) / TileT::kCluster);
    } else if (warp == 2) {
      if (!product.after_fetch) wait_for_previous_kernel();
      start_next_kernel();
    }
  } else {
    take_registers<232>();
    Multiplier<T, TileT, kGated>(shared, &product).run();
  }
  // A block's shared memory must live until the other has stopped writing to it.
  if constexpr (TileT::kCluster > 1) {
    __syncwarp();
    cluster_sync();
  }
#endif
}

}  // namespace moe_infer::hopper
