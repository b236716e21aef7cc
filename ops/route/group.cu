// Sorts the choices by expert: a stable radix sort on as many bits as expert indices have, then a search for each
// expert's first row in the sorted indices, and the inverse map.
#include <cub/device/device_radix_sort.cuh>

#include "core/cuda_check.h"
#include "route/group_scratch.h"
#include "route/route.h"
#include "sublayers/sub_layer.h"

namespace moe_infer {
namespace {

constexpr int kThreads = 256;

int bits_of(int32_t experts) {
  int bits = 1;
  while (bits < 31 && (1 << bits) < experts) ++bits;
  return bits;
}

// Both the size query and the sort, so that they cannot differ.
void sort(void* scratch, size_t* scratch_bytes, int64_t rows, int32_t experts, uint32_t const* keys,
          uint32_t* sorted_keys, int32_t const* values, int32_t* sorted_values, cudaStream_t stream) {
  MOE_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(scratch, *scratch_bytes, keys, sorted_keys, values, sorted_values,
                                                 static_cast<int>(rows), 0, bits_of(experts), stream));
}

size_t keys_bytes(int64_t rows) { return (static_cast<size_t>(rows) * sizeof(uint32_t) + 255) / 256 * 256; }

__global__ void __launch_bounds__(kThreads) number_kernel(int32_t rows, int32_t* numbers, int32_t* counters) {
  int64_t const i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < rows) numbers[i] = static_cast<int32_t>(i);
  if (i < kCountersOfCall) counters[i] = 0;
}

// First row whose expert is at least `expert`.
__device__ int32_t first_row(uint32_t const* experts_of_rows, int32_t rows, uint32_t expert) {
  int32_t low = 0;
  int32_t high = rows;
  while (low < high) {
    int32_t const middle = low + (high - low) / 2;
    if (experts_of_rows[middle] < expert) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

__global__ void __launch_bounds__(kThreads)
    find_rows_kernel(uint32_t const* __restrict__ experts_of_rows, int32_t const* __restrict__ choice_of_row,
                     int32_t rows, int32_t experts, int32_t* __restrict__ row_of_choice,
                     int32_t* __restrict__ row_begin, int32_t* __restrict__ counts) {
  int64_t const i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < rows) row_of_choice[choice_of_row[i]] = static_cast<int32_t>(i);
  if (i <= experts) {
    int32_t const begin = first_row(experts_of_rows, rows, static_cast<uint32_t>(i));
    row_begin[i] = begin;
    if (i < experts) counts[i] = first_row(experts_of_rows, rows, static_cast<uint32_t>(i + 1)) - begin;
  }
}

}  // namespace

size_t group_scratch_bytes(int64_t rows, int32_t experts) {
  if (rows == 0) return 0;
  size_t bytes = 0;
  sort(nullptr, &bytes, rows, experts, nullptr, nullptr, nullptr, nullptr, nullptr);
  return keys_bytes(rows) + bytes;
}

void group_by_expert(int64_t tokens, int32_t experts, int32_t top_k, Routing const& routing, cudaStream_t stream) {
  if (tokens == 0) return;
  int64_t const rows = tokens * top_k;
  auto* const sorted_keys = static_cast<uint32_t*>(routing.sort_scratch);
  void* const scratch = static_cast<uint8_t*>(routing.sort_scratch) + keys_bytes(rows);
  size_t scratch_bytes = routing.sort_scratch_bytes - keys_bytes(rows);
  int32_t* const numbers = routing.row_of_choice;  // until the inverse map takes its place

  number_kernel<<<static_cast<unsigned>((rows + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
      static_cast<int32_t>(rows), numbers, routing.counters);
  MOE_CUDA_CHECK(cudaGetLastError());
  sort(scratch, &scratch_bytes, rows, experts, reinterpret_cast<uint32_t const*>(routing.expert_of_choice), sorted_keys,
       numbers, routing.choice_of_row, stream);
  int64_t const threads = rows > experts + 1 ? rows : experts + 1;
  find_rows_kernel<<<static_cast<unsigned>((threads + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
      sorted_keys, routing.choice_of_row, static_cast<int32_t>(rows), experts, routing.row_of_choice, routing.row_begin,
      routing.counts);
  MOE_CUDA_CHECK(cudaGetLastError());
}

}  // namespace moe_infer
