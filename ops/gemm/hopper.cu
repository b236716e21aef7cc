// Prepares a grouped product for the Hopper kernel: the maps by which the copy engine finds the operands, and the tile.
#include <array>
#include <cstdlib>
#include <string>

#include "core/cuda_check.h"
#include "core/device_limits.h"
#include "core/driver_function.h"
#include "gemm/hopper.h"
#include "gemm/hopper_kernel.cuh"

namespace moe_infer::hopper {
namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, cuuint64_t const*, cuuint64_t const*,
                            cuuint32_t const*, cuuint32_t const*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

Encode encode_function() {
  static Encode const function = [] {
    void* const found = driver_function("cuTensorMapEncodeTiled");
    if (found == nullptr) {
      throw Error(MOE_INFER_CUDA,
                  "CUDA: the driver has no cuTensorMapEncodeTiled; install a driver for CUDA 12 or newer");
    }
    return reinterpret_cast<Encode>(found);
  }();
  return function;
}

// Sizes, strides (bytes, of all dimensions but the innermost) and box in elements, innermost first; rows of kDepth
// elements in the 128-byte swizzle. What lies outside the sizes is read as zero.
template <size_t kRank>
CUtensorMap make_map(DataType dtype, void const* base, std::array<cuuint64_t, kRank> const& sizes,
                     std::array<cuuint64_t, kRank - 1> const& strides, std::array<cuuint32_t, kRank> const& box) {
  std::array<cuuint32_t, kRank> steps;
  steps.fill(1);
  CUtensorMap map;
  auto const type = dtype == DataType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  CUresult const result =
      encode_function()(&map, type, kRank, const_cast<void*>(base), sizes.data(), strides.data(), box.data(),
                        steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw Error(MOE_INFER_CUDA, "CUDA: cuTensorMapEncodeTiled failed with " + std::to_string(result));
  }
  return map;
}

// Weights (slot, n, k). Dimensions: k, row in an eight, then either the eight; or, gated, gate or up, and the eight of
// both, whereby a box has 8 gate rows, their 8 up rows, the next 8 gate rows, ...; slot.
CUtensorMap weights_map(GroupedGemm const& gemm) {
  auto const n = static_cast<cuuint64_t>(gemm.n);
  auto const k = static_cast<cuuint64_t>(gemm.k);
  cuuint64_t const row = k * size_of(gemm.dtype);
  void const* const base = gemm.groups.slots + gemm.weight_offset;
  constexpr cuuint32_t kEights = kWeightRows / 8;
  if (gemm.activation.gated) {
    return make_map<5>(gemm.dtype, base, {k, 8, 2, n / 16, kMaxExperts},
                       {2 * row, row, 16 * row, gemm.groups.slot_bytes}, {kDepth, 8, 2, kEights / 2, 1});
  }
  return make_map<5>(gemm.dtype, base, {k, 8, n / 8, 1, kMaxExperts}, {row, 8 * row, n * row, gemm.groups.slot_bytes},
                     {kDepth, 8, kEights, 1, 1});
}

CUtensorMap tokens_map(GroupedGemm const& gemm, TileRows tile_rows) {
  return make_map<2>(gemm.dtype, gemm.input, {static_cast<cuuint64_t>(gemm.k), static_cast<cuuint64_t>(gemm.rows)},
                     {static_cast<cuuint64_t>(gemm.input_stride) * size_of(gemm.dtype)},
                     {kDepth, static_cast<cuuint32_t>(box_rows_of(tile_rows))});
}

// By rows an expert, on average over the call. A tile should hold an expert's rows at once, so that its weights are
// read once, with room for uneven routing; more room costs stages.
TileRows tile_rows_for(GroupedGemm const& gemm) {
  // For benchmarks/tile_rows.py, which measures what the thresholds should be (benchmarks/results/tile_rows.json).
  if (char const* const forced = std::getenv("MOE_INFER_TILE_ROWS"); forced != nullptr) {
    for (TileRows const rows : {TileRows::k32, TileRows::k64, TileRows::k128, TileRows::k288}) {
      if (std::to_string(static_cast<int>(rows)) == forced) return rows;
    }
  }
  int64_t const average = gemm.rows / gemm.expert_count;
  if (average <= 20) return TileRows::k32;
  if (average <= 28) return TileRows::k64;
  if (average <= 112) return TileRows::k128;
  return TileRows::k288;
}

int32_t divide_up(int64_t a, int64_t b) { return static_cast<int32_t>((a + b - 1) / b); }

}  // namespace

bool can_run(GroupedGemm const& gemm) {
  return gemm.dtype != DataType::kFloat32 && (!gemm.activation.gated || gemm.n % 16 == 0) && gemm.counters != nullptr &&
         is_hopper();
}

void run(GroupedGemm const& gemm) {
  Launch launch;
  launch.tile_rows = tile_rows_for(gemm);
  launch.weights = weights_map(gemm);
  launch.tokens = tokens_map(gemm, launch.tile_rows);
  // Each group with rows has at most one tile that is not full.
  launch.most_row_tiles =
      gemm.rows / static_cast<int64_t>(launch.tile_rows) + std::min<int64_t>(gemm.groups.count, gemm.rows);
  launch.overlap = gemm.overlap;
  launch.stream = gemm.stream;

  Product product;
  product.groups = gemm.groups;
  product.blocks = divide_up(gemm.n, kWeightRows * cluster_of(launch.tile_rows));
  product.k_steps = divide_up(gemm.k, kDepth);
  product.channels = static_cast<int32_t>(gemm.activation.gated ? gemm.n / 2 : gemm.n);
  product.output = gemm.output;
  product.source = gemm.source;
  product.activation = gemm.activation;
  product.has_bias = gemm.has_bias;
  product.bias_offset = gemm.bias_offset;
  product.counters = gemm.counters;
  product.after_fetch = gemm.after_fetch && gemm.overlap;
  if (gemm.dtype == DataType::kBFloat16) {
    gemm.activation.gated ? launch_bfloat16_gated(launch, product) : launch_bfloat16(launch, product);
  } else {
    gemm.activation.gated ? launch_float16_gated(launch, product) : launch_float16(launch, product);
  }
}

}  // namespace moe_infer::hopper
