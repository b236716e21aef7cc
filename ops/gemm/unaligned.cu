// 16-bit products of any size and alignment: one element an access, float32 arithmetic. For layers whose sizes are no
// multiples of 8, which no known model has, and for gated products with a bias before Hopper; it is here so that they
// are right, not fast.
#include <algorithm>

#include "core/cuda_check.h"
#include "core/element.cuh"
#include "gemm/group_search.cuh"
#include "gemm/instances.h"

namespace moe_infer {
namespace {

constexpr int kTile = 64;   // rows and columns of a block's tile
constexpr int kDepth = 16;  // of k a step
constexpr int kThreads = 256;
constexpr int kSide = 4;  // a thread computes 4 x 4 outputs
constexpr int kAcross = kTile / kSide;

// Tiles of rows are numbered so that no scan over the groups is needed: group g's tiles begin at number
// row_begin[g] / kTile + g. It has at most row_end[g] / kTile - row_begin[g] / kTile + 1, so groups do not overlap;
// some numbers stay unused.
__device__ int64_t first_tile(ExpertGroups const& groups, int32_t g) { return groups.row_begin[g] / kTile + g; }

__device__ int32_t group_of_tile(ExpertGroups const& groups, int64_t tile) {
  int32_t low = 0;
  int32_t high = groups.count;
  while (low < high) {
    int32_t const middle = low + (high - low) / 2;
    if (first_tile(groups, middle) <= tile) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low - 1;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    unaligned_kernel(ExpertGroups groups, T const* __restrict__ input, int64_t input_stride, uint64_t weight_offset,
                     bool has_bias, uint64_t bias_offset, T const* source, T* output, int64_t n, int64_t k,
                     Activation activation) {
  __shared__ float a[kDepth][kTile + 1];
  __shared__ float b[kDepth][kTile + 1];
  int const thread = static_cast<int>(threadIdx.x);
  int const down = thread / kAcross * kSide;    // first row of the thread in the tile
  int const across = thread % kAcross * kSide;  // first column

  int64_t const column_tiles = (n + kTile - 1) / kTile;
  int64_t const begin_tile = first_tile(groups, 0) * column_tiles;
  int64_t const end_tile = (end_row(groups) / kTile + groups.count) * column_tiles;
  for (int64_t tile = begin_tile + blockIdx.x; tile < end_tile; tile += gridDim.x) {
    int64_t const row_tile = tile / column_tiles;
    int32_t const g = group_of_tile(groups, row_tile);
    int64_t const row = groups.row_begin[g] + (row_tile - first_tile(groups, g)) * kTile;
    int64_t const rows = groups.row_end[g] - row;  // left in the group; 0 or less: an unused number
    if (rows <= 0) continue;                       // the same for the whole block
    int64_t const column = tile % column_tiles * kTile;
    auto const* const weights = reinterpret_cast<T const*>(expert_tensor(groups, g, weight_offset));
    auto const* const bias = reinterpret_cast<T const*>(expert_tensor(groups, g, bias_offset));

    float sums[kSide][kSide] = {};
    for (int64_t step = 0; step < k; step += kDepth) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kTile * kDepth / kThreads; ++i) {
        int const line = (i * kThreads + thread) / kDepth;
        int const depth = (i * kThreads + thread) % kDepth;
        bool const inside = step + depth < k;
        a[depth][line] = inside && line < rows ? to_float(input[(row + line) * input_stride + step + depth]) : 0.0F;
        b[depth][line] = inside && column + line < n ? to_float(weights[(column + line) * k + step + depth]) : 0.0F;
      }
      __syncthreads();
#pragma unroll
      for (int depth = 0; depth < kDepth; ++depth) {
#pragma unroll
        for (int i = 0; i < kSide; ++i) {
#pragma unroll
          for (int j = 0; j < kSide; ++j) sums[i][j] = fmaf(a[depth][down + i], b[depth][across + j], sums[i][j]);
        }
      }
    }
    if (has_bias) {
#pragma unroll
      for (int j = 0; j < kSide; ++j) {
        int64_t const c = column + across + j;
        float const added = c < n ? to_float(bias[c]) : 0.0F;
#pragma unroll
        for (int i = 0; i < kSide; ++i) sums[i][j] += added;
      }
    }
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      if (down + i >= rows) continue;
      int64_t const at = row + down + i;
      if (!activation.gated) {
#pragma unroll
        for (int j = 0; j < kSide; ++j) {
          int64_t const c = column + across + j;
          if (c >= n) continue;
          float const added = source == nullptr ? 0.0F : to_float(source[at * n + c]);
          output[at * n + c] = from_float<T>(apply_plain(activation, sums[i][j]) + added);
        }
      } else {
#pragma unroll
        for (int j = 0; j < kSide; j += 2) {
          int64_t const c = column + across + j;
          if (c >= n) continue;
          output[at * (n / 2) + c / 2] = from_float<T>(apply_gated(activation, sums[i][j], sums[i][j + 1]));
        }
      }
    }
  }
}

}  // namespace

void run_unaligned(GroupedGemm const& gemm) {
  constexpr int64_t kMostBlocks = 4096;
  int64_t const tiles = (gemm.rows / kTile + gemm.groups.count) * ((gemm.n + kTile - 1) / kTile);
  auto const blocks = static_cast<unsigned>(std::min(tiles, kMostBlocks));
  with_element(gemm.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    unaligned_kernel<T><<<blocks, kThreads, 0, gemm.stream>>>(
        gemm.groups, static_cast<T const*>(gemm.input), gemm.input_stride, gemm.weight_offset, gemm.has_bias,
        gemm.bias_offset, static_cast<T const*>(gemm.source), static_cast<T*>(gemm.output), gemm.n, gemm.k,
        gemm.activation);
  });
  MOE_CUDA_CHECK(cudaGetLastError());
}

}  // namespace moe_infer
