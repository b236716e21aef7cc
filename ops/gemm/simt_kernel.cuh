// A grouped product on the FP32 units, by a block at a time. A tile's sums come from the same operations in the same
// order whatever the tile is, so every element's bits depend on its row and column of the operands alone.
#pragma once

#include <cstdint>

#include "gemm/group_search.cuh"
#include "gemm/grouped_gemm.h"
#include "gemm/simt_tile.cuh"

namespace moe_infer::simt {

// Products that are summed in sequence. The rounding error of such a sum grows with its length: with 16,384 float32
// products in one sequence some elements are beyond the tolerance (docs/kernels.md). So a thread sums slices of k, and
// adds each slice's sum to a total. Where the cuts are depends on k alone.
constexpr int kSlice = 1024;
static_assert(kSlice % kDepth == 0, "a slice ends with a stage");

// Tiles of rows are numbered so that no scan over the groups is needed. Those of group g begin at its first row
// (counted from the call's first) / kRows, and one more for each group before that may have rows, of which there are at
// most as many as rows. So groups do not overlap, some numbers stay unused, and groups without rows have no numbers
// where rows are few. g may be the number of groups: the end.
template <int kRows>
__device__ inline int64_t first_tile(ExpertGroups const& groups, int32_t g) {
  int64_t const row = (g < groups.count ? groups.row_begin[g] : end_row(groups)) - first_row(groups);
  return row / kRows + (g < row ? g : row);
}

struct Place {
  int32_t group;
  int64_t row;   // of the whole input
  int32_t rows;  // from there on in the tile; 0: an unused number
  int64_t column;
};

// A group's tiles of rows lie side by side in the order, for each tile of columns: blocks that run at the same time
// read the same weights.
template <class TileT>
__device__ inline Place place_of_tile(ExpertGroups const& groups, int64_t tile, int64_t column_tiles) {
  Place place;
  place.group = last_group_before(groups.count, tile / column_tiles,
                                  [&](int32_t g) { return first_tile<TileT::kRows>(groups, g); });
  int64_t const first = first_tile<TileT::kRows>(groups, place.group);
  int64_t const row_tiles = first_tile<TileT::kRows>(groups, place.group + 1) - first;
  int64_t const in_group = tile - first * column_tiles;
  place.row = groups.row_begin[place.group] + in_group % row_tiles * TileT::kRows;
  int64_t const rows = groups.row_end[place.group] - place.row;
  place.rows = static_cast<int32_t>(rows < 0 ? 0 : rows < TileT::kRows ? rows : TileT::kRows);
  place.column = in_group / row_tiles * TileT::kColumns;
  return place;
}

// A thread's totals, in shared memory, where they leave the registers to two blocks a multiprocessor: unit i of thread
// t at i * kThreads + t.
template <class TileT>
__device__ inline void add_slice(float4* totals, float (&sums)[kThreadRows][TileT::kThreadColumns], bool is_first) {
#pragma unroll
  for (int i = 0; i < TileT::kThreadUnits; ++i) {
    float* const sum = &sums[i / (TileT::kThreadColumns / kUnit)][i % (TileT::kThreadColumns / kUnit) * kUnit];
    float4 total = {0.0F, 0.0F, 0.0F, 0.0F};
    if (!is_first) total = totals[i * TileT::kThreads];
    totals[i * TileT::kThreads] = {total.x + sum[0], total.y + sum[1], total.z + sum[2], total.w + sum[3]};
    sum[0] = sum[1] = sum[2] = sum[3] = 0.0F;
  }
}

// Leaves the tile's products in `totals`.
template <class T, bool kAligned, class TileT>
__device__ inline void multiply_tile(GroupedGemm const& gemm, Place const& place, int thread, float4* stages,
                                     float4* totals) {
  auto const k = static_cast<int>(gemm.k);
  auto const* const weights = reinterpret_cast<T const*>(expert_tensor(gemm.groups, place.group, gemm.weight_offset));
  LineLoader<T, kAligned, TileT, TileT::kRows, kRowMask> input_loader(
      static_cast<T const*>(gemm.input) + place.row * gemm.input_stride, gemm.input_stride, place.rows, thread);
  LineLoader<T, kAligned, TileT, TileT::kColumns, kColumnMask> weight_loader(weights + place.column * gemm.k, gemm.k,
                                                                             gemm.n - place.column, thread);
  bool const swapped = TileT::loads_swapped(thread);
  auto const load = [&](int step, int stage) {
    int const left = k - step * kDepth - thread % kUnits * kUnit;
    float4* const to = stages + stage * TileT::kStageUnits;
    if (swapped) {
      input_loader.template load<true>(to, gemm.input_stride, left);
    } else {
      input_loader.template load<false>(to, gemm.input_stride, left);
    }
    weight_loader.template load<false>(to + TileT::kRows * kUnits, gemm.k, left);
  };

  int const steps = (k - 1) / kDepth + 1;
  int loaded = 0;
  for (; loaded < TileT::kStages - 1; ++loaded) {
    if (loaded < steps) load(loaded, loaded);
    close_copies();
  }
  int const row_place = place_of<kRowMask>(TileT::row_of(thread), 0);
  int const column_place = place_of<kColumnMask>(TileT::column_of(thread), 0);
  int const active = (place.rows + TileT::kRowStep - 1) / TileT::kRowStep;
  float sums[kThreadRows][TileT::kThreadColumns] = {};
  int stage_at = 0;
  int load_at = TileT::kStages - 1;
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<TileT::kStages - 2>();
    __syncthreads();  // all have this stage, and have left the one before, which is loaded anew
    if (loaded < steps) load(loaded, load_at);
    ++loaded;
    close_copies();
    float4 const* const stage = stages + stage_at * TileT::kStageUnits;
    if (active > 6) {
      multiply_stage<TileT, 8>(stage, row_place, column_place, sums);
    } else if (active > 4) {
      multiply_stage<TileT, 6>(stage, row_place, column_place, sums);
    } else if (active > 2) {
      multiply_stage<TileT, 4>(stage, row_place, column_place, sums);
    } else {
      multiply_stage<TileT, 2>(stage, row_place, column_place, sums);
    }
    if ((step + 1) % (kSlice / kDepth) == 0 || step + 1 == steps) {
      add_slice<TileT>(totals, sums, step < kSlice / kDepth);
    }
    stage_at = stage_at + 1 == TileT::kStages ? 0 : stage_at + 1;
    load_at = load_at + 1 == TileT::kStages ? 0 : load_at + 1;
  }
}

// Two neighbouring columns of a row become two elements of the output, or one.
template <class T, bool kAligned>
__device__ inline void store_pair(GroupedGemm const& gemm, T const* bias, int64_t row, int64_t column, float first,
                                  float second) {
  bool const has_second = kAligned || column + 1 < gemm.n;
  if (bias != nullptr) {
    first += to_float(bias[column]);
    if (has_second) second += to_float(bias[column + 1]);
  }
  auto* const output = static_cast<T*>(gemm.output);
  if (gemm.activation.gated) {
    output[row * (gemm.n / 2) + column / 2] = from_float<T>(apply_gated(gemm.activation, first, second));
    return;
  }
  first = apply_plain(gemm.activation, first);
  second = apply_plain(gemm.activation, second);
  int64_t const at = row * gemm.n + column;
  if (gemm.source != nullptr) {
    auto const* const source = static_cast<T const*>(gemm.source);
    first += to_float(source[at]);
    if (has_second) second += to_float(source[at + 1]);
  }
  if constexpr (kAligned) {
    *reinterpret_cast<Pack<T, 2>*>(output + at) = {{from_float<T>(first), from_float<T>(second)}};
  } else {
    output[at] = from_float<T>(first);
    if (has_second) output[at + 1] = from_float<T>(second);
  }
}

template <class T, bool kAligned, class TileT>
__device__ inline void store_tile(GroupedGemm const& gemm, Place const& place, int thread, float4 const* totals) {
  constexpr int kUnitsOfRow = TileT::kThreadColumns / kUnit;
  T const* bias = nullptr;
  if (gemm.has_bias) bias = reinterpret_cast<T const*>(expert_tensor(gemm.groups, place.group, gemm.bias_offset));
  // A loop, for the sake of the code's size: the activation is much of it.
#pragma unroll 1
  for (int i = 0; i < TileT::kThreadUnits; ++i) {
    int const row = TileT::row_of(thread) + i / kUnitsOfRow * TileT::kRowStep;
    if (row >= place.rows) break;
    float4 const total = totals[i * TileT::kThreads];
    int64_t const column = place.column + TileT::column_of(thread) + i % kUnitsOfRow * 2 * TileT::kPairStep;
    if (column < gemm.n) store_pair<T, kAligned>(gemm, bias, place.row + row, column, total.x, total.y);
    int64_t const next = column + TileT::kPairStep;
    if (next < gemm.n) store_pair<T, kAligned>(gemm, bias, place.row + row, next, total.z, total.w);
  }
}

// The tiles of block `block` of `blocks`. kAligned: rows of all operands begin at 16 bytes.
template <class T, bool kAligned, class TileT>
__device__ inline void run_block(GroupedGemm const& gemm, int64_t block, int64_t blocks, int thread, float4* shared) {
  float4* const totals = shared + TileT::kStages * TileT::kStageUnits + thread;
  int64_t const column_tiles = (gemm.n + TileT::kColumns - 1) / TileT::kColumns;
  int64_t const tiles = first_tile<TileT::kRows>(gemm.groups, gemm.groups.count) * column_tiles;
  for (int64_t tile = block; tile < tiles; tile += blocks) {
    Place const place = place_of_tile<TileT>(gemm.groups, tile, column_tiles);
    if (place.rows == 0) continue;  // the same for the whole block
    multiply_tile<T, kAligned, TileT>(gemm, place, thread, shared, totals);
    store_tile<T, kAligned, TileT>(gemm, place, thread, totals);
    __syncthreads();  // all have left the stages
  }
}

}  // namespace moe_infer::simt
