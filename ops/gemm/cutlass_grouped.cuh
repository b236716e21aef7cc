// Runs one CUTLASS grouped GEMM kernel on problems whose sizes only the device knows.
#pragma once

#include <cutlass/epilogue/thread/linear_combination.h>
#include <cutlass/gemm/device/gemm_grouped.h>
#include <cutlass/gemm/kernel/default_gemm_grouped.h>

#include <string>

#include "core/cuda_check.h"
#include "gemm/problems.h"

namespace moe_infer {

inline void cutlass_check(cutlass::Status status, char const* step) {
  if (status != cutlass::Status::kSuccess) {
    throw Error(MOE_INFER_CUDA,
                std::string("CUTLASS grouped GEMM, ") + step + ": " + cutlass::cutlassGetStatusString(status));
  }
}

template <class Kernel>
void run_cutlass_grouped(GroupedGemm const& gemm, Problems const& problems) {
  static_assert(sizeof(ProblemSize) == sizeof(cutlass::gemm::GemmCoord), "Problems mirrors GemmCoord");
  using Device = cutlass::gemm::device::GemmGrouped<Kernel>;
  using Element = typename Kernel::ElementA;

  // As many blocks as the device holds at once; they take tiles in turn. Asked once: it costs several queries.
  static int const blocks = Device::sufficient();
  if (blocks <= 0) throw Error(MOE_INFER_CUDA, "CUTLASS grouped GEMM: the kernel does not fit on this GPU");

  auto** a = reinterpret_cast<Element**>(problems.a);
  auto** w = reinterpret_cast<Element**>(problems.w);
  auto** c = reinterpret_cast<Element**>(problems.c);
  typename Device::Arguments const arguments(reinterpret_cast<cutlass::gemm::GemmCoord*>(problems.sizes),
                                             gemm.groups.count, blocks, {1.0F, 0.0F}, a, w, c, c, problems.stride_k,
                                             problems.stride_k, problems.stride_n, problems.stride_n, nullptr);
  Device device;
  cutlass_check(device.initialize(arguments, nullptr, gemm.stream), "initialise");
  cutlass_check(device.run(gemm.stream), "run");
}

}  // namespace moe_infer
