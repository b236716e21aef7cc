#include "core/cuda_check.h"
#include "core/device_types.cuh"
#include "gemm/problems.h"

namespace moe_infer {
namespace {

constexpr int kTile = 64;  // rows and columns of C for each block
constexpr int kDepth = 16;
constexpr int kEach = 4;  // a thread has kEach x kEach elements of the tile
constexpr int kThreads = (kTile / kEach) * (kTile / kEach);

// Plain tiled product for sizes that no tensor-core instance takes. Block (x, y): columns x of group y, all its rows.
template <class T>
__global__ void tiled(ExpertGroups groups, int64_t n, int64_t k, uint64_t weight_offset, T const* a, T* c) {
  __shared__ float left[kDepth][kTile + 1];
  __shared__ float right[kDepth][kTile + 1];
  int const g = blockIdx.y;
  int64_t const begin = groups.row_begin[g];
  int64_t const end = groups.row_end[g];
  auto const* w = reinterpret_cast<T const*>(
      groups.slots + static_cast<uint64_t>(groups.slot_of_group[g]) * groups.slot_bytes + weight_offset);
  int64_t const first_column = static_cast<int64_t>(blockIdx.x) * kTile;
  int const thread_row = static_cast<int>(threadIdx.x) / (kTile / kEach);
  int const thread_column = static_cast<int>(threadIdx.x) % (kTile / kEach);

  for (int64_t first_row = begin; first_row < end; first_row += kTile) {
    float sum[kEach][kEach] = {};
    for (int64_t depth = 0; depth < k; depth += kDepth) {
      for (int i = static_cast<int>(threadIdx.x); i < kTile * kDepth; i += kThreads) {
        int const line = i / kDepth;
        int64_t const d = depth + i % kDepth;
        int64_t const row = first_row + line;
        int64_t const column = first_column + line;
        left[i % kDepth][line] = row < end && d < k ? to_float(a[row * k + d]) : 0.0F;
        right[i % kDepth][line] = column < n && d < k ? to_float(w[column * k + d]) : 0.0F;
      }
      __syncthreads();
      for (int d = 0; d < kDepth; ++d) {
        for (int i = 0; i < kEach; ++i) {
          for (int j = 0; j < kEach; ++j) {
            sum[i][j] += left[d][thread_row * kEach + i] * right[d][thread_column * kEach + j];
          }
        }
      }
      __syncthreads();
    }
    for (int i = 0; i < kEach; ++i) {
      for (int j = 0; j < kEach; ++j) {
        int64_t const row = first_row + thread_row * kEach + i;
        int64_t const column = first_column + thread_column * kEach + j;
        if (row < end && column < n) c[row * n + column] = from_float<T>(sum[i][j]);
      }
    }
  }
}

}  // namespace

void grouped_gemm_any(GroupedGemm const& gemm) {
  dim3 const grid(static_cast<unsigned>((gemm.n + kTile - 1) / kTile), static_cast<unsigned>(gemm.groups.count));
  with_type(gemm.dtype, [&](auto zero) {
    using T = decltype(zero);
    tiled<T><<<grid, kThreads, 0, gemm.stream>>>(gemm.groups, gemm.n, gemm.k, gemm.weight_offset,
                                                 static_cast<T const*>(gemm.a), static_cast<T*>(gemm.c));
  });
  MOE_CUDA_CHECK(cudaGetLastError());
}

}  // namespace moe_infer
