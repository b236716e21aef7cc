// Launches a grouped kernel of CUTLASS 2.x, which runs on sm_80 and later; its blocks share the tiles of all groups out
// among themselves on the device (GroupScheduleMode::kDeviceOnly).
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/device_kernel.h>
#include <cutlass/gemm/kernel/default_gemm_grouped.h>
#include <cutlass/gemm/kernel/gemm_grouped.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>

#include "core/cuda_check.h"
#include "gemm/activated_epilogue.cuh"
#include "gemm/gated_epilogue.cuh"
#include "gemm/instances.h"

namespace moe_infer {

// Blocks of the kernel that the current device holds at once. Asked once a device: it also allows the kernel its shared
// memory, and both cost microseconds.
template <class Kernel>
int resident_blocks() {
  constexpr int kDevices = 64;
  static std::array<std::atomic<int>, kDevices> known{};
  int device = 0;
  MOE_CUDA_CHECK(cudaGetDevice(&device));
  if (device < kDevices && known[static_cast<size_t>(device)] != 0) return known[static_cast<size_t>(device)];

  auto const shared = static_cast<int>(sizeof(typename Kernel::SharedStorage));
  int multiprocessors = 0;
  int blocks = 0;
  MOE_CUDA_CHECK(cudaFuncSetAttribute(cutlass::Kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  MOE_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  MOE_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, cutlass::Kernel<Kernel>, Kernel::kThreadCount,
                                                               static_cast<size_t>(shared)));
  int const resident = std::max(1, multiprocessors * blocks);
  if (device < kDevices) known[static_cast<size_t>(device)] = resident;
  return resident;
}

template <class Kernel>
void launch_grouped(GroupedGemm const& gemm, GroupArrays const& arrays,
                    typename Kernel::EpilogueOutputOp::Params const& output_op) {
  using Tile = typename Kernel::ThreadblockShape;
  // No more blocks than there can be tiles: each group with rows has at most one tile of rows that is not full.
  int64_t const row_tiles = gemm.rows / Tile::kM + std::min<int64_t>(gemm.groups.count, gemm.rows);
  int64_t const tiles = row_tiles * ((gemm.n + Tile::kN - 1) / Tile::kN);
  auto const blocks = static_cast<int>(std::min<int64_t>(tiles, resident_blocks<Kernel>()));
  typename Kernel::Arguments const arguments(
      reinterpret_cast<cutlass::gemm::GemmCoord*>(arrays.problems), gemm.groups.count, blocks, output_op,
      reinterpret_cast<typename Kernel::ElementA**>(arrays.inputs),
      reinterpret_cast<typename Kernel::ElementB**>(arrays.weights),
      reinterpret_cast<typename Kernel::ElementC**>(arrays.sources),
      reinterpret_cast<typename Kernel::ElementC**>(arrays.outputs), arrays.input_strides, arrays.weight_strides,
      arrays.source_strides, arrays.output_strides);
  typename Kernel::Params const params(arguments);
  cutlass::Kernel<Kernel>
      <<<static_cast<unsigned>(blocks), Kernel::kThreadCount, sizeof(typename Kernel::SharedStorage), gemm.stream>>>(
          params);
  MOE_CUDA_CHECK(cudaGetLastError());
}

// For ActivatedCombination: what is added to a product is its source operand, be it the source or the bias.
inline bool has_source(GroupedGemm const& gemm) { return gemm.source != nullptr || gemm.has_bias; }

// 16-bit operands on tensor cores; `Tile` and `Warp` are cutlass::gemm::GemmShape.
template <class Element, class Tile, class Warp, int Stages>
struct TensorCoreGemm {
  template <class OutputOp>
  using Kernel = typename cutlass::gemm::kernel::DefaultGemmGrouped<
      Element, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, 8, Element, cutlass::layout::ColumnMajor,
      cutlass::ComplexTransform::kNone, 8, typename OutputOp::ElementOutput, cutlass::layout::RowMajor, float,
      cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Tile, Warp, cutlass::gemm::GemmShape<16, 8, 16>, OutputOp,
      cutlass::gemm::threadblock::GemmBatchedIdentityThreadblockSwizzle, Stages,
      cutlass::gemm::kernel::GroupScheduleMode::kDeviceOnly>::GemmKernel;

  using Plain = Kernel<ActivatedCombination<Element, 8>>;
  using Gated = Kernel<GatedCombination<Element, 8>>;

  static void run(GroupedGemm const& gemm, GroupArrays const& arrays) {
    if (gemm.activation.gated) {
      launch_grouped<Gated>(gemm, arrays, {gemm.activation});
    } else {
      launch_grouped<Plain>(gemm, arrays, {gemm.activation, has_source(gemm)});
    }
  }
};

// Many rows an expert: 128 x 128 outputs a block, 4 warps of 64 x 64.
template <class Element>
using WideGemm =
    TensorCoreGemm<Element, cutlass::gemm::GemmShape<128, 128, 32>, cutlass::gemm::GemmShape<64, 64, 32>, 4>;
// Few: 16 rows, as few as a tensor-core instruction has, and weights in longer pieces.
template <class Element>
using NarrowGemm =
    TensorCoreGemm<Element, cutlass::gemm::GemmShape<16, 128, 64>, cutlass::gemm::GemmShape<16, 32, 64>, 4>;

}  // namespace moe_infer
