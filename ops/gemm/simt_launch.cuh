// Launches the kernel on the FP32 units.
#pragma once

#include <algorithm>

#include "core/device_limits.h"
#include "core/launch.h"
#include "gemm/simt_kernel.cuh"

namespace moe_infer::simt {

template <class T, bool kAligned, class TileT>
__global__ void __launch_bounds__(TileT::kThreads, kAligned ? TileT::kBlocks : 1) kernel(GroupedGemm const gemm) {
  extern __shared__ float4 shared[];
  run_block<T, kAligned, TileT>(gemm, blockIdx.x, gridDim.x, static_cast<int>(threadIdx.x), shared);
}

template <class T, bool kAligned, class TileT>
void launch_tile(GroupedGemm const& gemm) {
  // Several times what fits: blocks with little to do make room for others. Not one a tile: what a call of a single
  // expert of many has to do is far less than what the host knows of.
  constexpr int64_t kMostBlocks = 4096;
  int64_t const row_tiles = gemm.rows / TileT::kRows + std::min<int64_t>(gemm.groups.count, gemm.rows);
  int64_t const column_tiles = (gemm.n + TileT::kColumns - 1) / TileT::kColumns;
  auto* const function = &kernel<T, kAligned, TileT>;
  allow_shared_memory(reinterpret_cast<void const*>(function), TileT::kSharedBytes);
  LaunchShape shape;
  shape.blocks = static_cast<unsigned>(std::min(kMostBlocks, row_tiles * column_tiles));
  shape.threads = TileT::kThreads;
  shape.shared_bytes = TileT::kSharedBytes;
  shape.stream = gemm.stream;
  launch(function, shape, gemm);
}

template <class T, bool kAligned>
void run(GroupedGemm const& gemm, bool narrow) {
  narrow ? launch_tile<T, kAligned, Narrow>(gemm) : launch_tile<T, kAligned, Wide>(gemm);
}

}  // namespace moe_infer::simt
