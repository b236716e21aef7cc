// The grouped product on Hopper: what grouped_gemm calls, and the kernels behind it, one file for a type and form.
#pragma once

#include <cuda.h>

#include "gemm/grouped_gemm.h"

namespace moe_infer::hopper {

struct Product;

// True when the current device and the sizes allow it: 16-bit types, 16-byte rows.
bool can_run(GroupedGemm const& gemm);
void run(GroupedGemm const& gemm);

// Tiles of rows, by the most rows that a unit has (hopper_kernel.cuh).
enum class TileRows : int { k32 = 32, k64 = 64, k128 = 128, k288 = 288 };

struct Launch {
  TileRows tile_rows = TileRows::k32;
  CUtensorMap weights;
  CUtensorMap tokens;
  int64_t most_row_tiles = 0;
  bool overlap = false;
  cudaStream_t stream = nullptr;
};
void launch_bfloat16(Launch const& launch, Product const& product);
void launch_bfloat16_gated(Launch const& launch, Product const& product);
void launch_float16(Launch const& launch, Product const& product);
void launch_float16_gated(Launch const& launch, Product const& product);

// Blocks of a cluster, and rows of the input in one copy.
constexpr int cluster_of(TileRows rows) { return rows == TileRows::k288 ? 2 : 1; }
constexpr int box_rows_of(TileRows rows) { return rows == TileRows::k288 ? 32 : static_cast<int>(rows) / 4; }

}  // namespace moe_infer::hopper
