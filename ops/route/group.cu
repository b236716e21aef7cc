// Groups the choices by expert: a counting sort, stable, so that an expert's rows are in the order of their tokens.
//
// Blocks take consecutive stretches of the choices and count the experts in them; from the counts of all stretches each
// block then knows where its own rows begin and places them. Within a block the warps do the same with stretches of
// their own. Few choices take one block, which counts and places at once.
#include <algorithm>
#include <cub/block/block_scan.cuh>

#include "core/cuda_check.h"
#include "core/grid_dependency.cuh"
#include "core/launch.h"
#include "route/group_scratch.h"
#include "route/route.h"
#include "sublayers/sub_layer.h"

namespace moe_infer {
namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int64_t kStretch = 1024;  // choices of a block, while there are few blocks
constexpr int64_t kMostBlocks = 128;
constexpr int kItems = kMaxExperts / kThreads;  // experts of a thread in the scan
constexpr unsigned kAll = 0xffffffffU;
constexpr int kKept = kStretch / kThreads;  // choices of a lane that stay in registers

struct Choices {
  int32_t const* expert_of_choice;
  int32_t rows;
  int32_t experts;
  int32_t stretch;
  int32_t* block_counts;  // (blocks, experts)
};

struct Range {
  int32_t begin;
  int32_t end;
};

// The part of `whole` that is the turn of `index` of `parts`.
__device__ Range part_of(Range whole, int32_t index, int32_t parts) {
  int32_t const size = (whole.end - whole.begin + parts - 1) / parts;
  int32_t const begin = min(whole.end, whole.begin + index * size);
  return {begin, min(whole.end, begin + size)};
}

__device__ Range stretch_of_block(Choices const& c) {
  int32_t const begin = static_cast<int32_t>(blockIdx.x) * c.stretch;
  return {begin, min(c.rows, begin + c.stretch)};
}

__global__ void __launch_bounds__(kThreads) count_kernel(Choices const c, int32_t* counters) {
  extern __shared__ int32_t counts[];  // (experts)
  wait_for_previous_kernel();
  start_next_kernel();
  if (blockIdx.x == 0 && threadIdx.x < kCountersOfRun) counters[threadIdx.x] = 0;
  for (int32_t e = static_cast<int32_t>(threadIdx.x); e < c.experts; e += kThreads) counts[e] = 0;
  __syncthreads();
  Range const own = stretch_of_block(c);
  for (int32_t i = own.begin + static_cast<int32_t>(threadIdx.x); i < own.end; i += kThreads) {
    atomicAdd(&counts[c.expert_of_choice[i]], 1);
  }
  __syncthreads();
  for (int32_t e = static_cast<int32_t>(threadIdx.x); e < c.experts; e += kThreads) {
    c.block_counts[static_cast<int64_t>(blockIdx.x) * c.experts + e] = counts[e];
  }
}

// One block alone (gridDim.x == 1) needs no counts of others.
__global__ void __launch_bounds__(kThreads)
    place_kernel(Choices const c, int32_t* __restrict__ row_of_choice, int32_t* __restrict__ row_begin,
                 int32_t* __restrict__ counts, int32_t* counters) {
  using Scan = cub::BlockScan<int32_t, kThreads>;
  extern __shared__ int32_t next[];  // (warps, experts): the next row of the expert for the warp
  __shared__ typename Scan::TempStorage scan;
  auto const thread = static_cast<int32_t>(threadIdx.x);
  int32_t const lane = thread % kLanes;
  int32_t* const own_next = next + static_cast<int64_t>(thread / kLanes) * c.experts;
  bool const alone = gridDim.x == 1;
  for (int32_t i = thread; i < kWarps * c.experts; i += kThreads) next[i] = 0;
  __syncthreads();
  wait_for_previous_kernel();
  start_next_kernel();
  if (alone && thread < kCountersOfRun) counters[thread] = 0;

  Range const own = part_of(stretch_of_block(c), thread / kLanes, kWarps);
  // Lanes without a choice agree on an expert that does not exist.
  auto const expert_at = [&](int32_t i) { return i < own.end ? c.expert_of_choice[i] : c.experts; };
  int32_t kept[kKept];
#pragma unroll
  for (int k = 0; k < kKept; ++k) kept[k] = expert_at(own.begin + k * kLanes + lane);
  // The warp's choices, one a lane: work(number, expert).
  auto const for_own_choices = [&](auto const& work) {
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      int32_t const first = own.begin + k * kLanes;
      if (first < own.end) work(first + lane, kept[k]);
    }
    for (int32_t i = own.begin + kKept * kLanes + lane; i - lane < own.end; i += kLanes) work(i, expert_at(i));
  };
  for_own_choices([&](int32_t, int32_t e) {
    if (e < c.experts) atomicAdd(&own_next[e], 1);
  });
  __syncthreads();

  // A thread's experts are consecutive, as the scan wants them.
  int32_t total[kItems];   // rows of the expert
  int32_t before[kItems];  // of these, rows of earlier blocks
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    int32_t const e = thread * kItems + k;
    total[k] = 0;
    before[k] = 0;
    if (e >= c.experts) continue;
    if (alone) {
      for (int w = 0; w < kWarps; ++w) total[k] += next[w * c.experts + e];
    } else {
#pragma unroll 8
      for (unsigned b = 0; b < gridDim.x; ++b) {
        int32_t const count = c.block_counts[static_cast<int64_t>(b) * c.experts + e];
        total[k] += count;
        if (b < blockIdx.x) before[k] += count;
      }
    }
  }
  int32_t begin[kItems];
  Scan(scan).ExclusiveSum(total, begin);
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    int32_t const e = thread * kItems + k;
    if (e >= c.experts) continue;
    if (blockIdx.x == 0) {
      row_begin[e] = begin[k];
      counts[e] = total[k];
      if (e == c.experts - 1) row_begin[c.experts] = c.rows;
    }
    int32_t row = begin[k] + before[k];
    for (int w = 0; w < kWarps; ++w) {
      int32_t const count = next[w * c.experts + e];
      next[w * c.experts + e] = row;
      row += count;
    }
  }
  __syncthreads();

  for_own_choices([&](int32_t i, int32_t e) {
    bool const there = i < own.end;
    unsigned const peers = __match_any_sync(kAll, e);
    int32_t const rank = __popc(peers & ((1U << lane) - 1U));
    int32_t const row = there ? own_next[e] + rank : 0;
    __syncwarp();
    if (there) {
      if (rank == 0) own_next[e] = row + __popc(peers);
      row_of_choice[i] = row;
    }
    __syncwarp();
  });
}

struct Blocks {
  int32_t count;
  int32_t stretch;
};

Blocks blocks_for(int64_t rows) {
  int64_t const most = std::min(kMostBlocks, (rows + kStretch - 1) / kStretch);
  int64_t const stretch = (rows + most - 1) / most;
  return {static_cast<int32_t>((rows + stretch - 1) / stretch), static_cast<int32_t>(stretch)};
}

}  // namespace

size_t group_scratch_bytes(int64_t rows, int32_t experts) {
  if (rows == 0) return 0;
  return static_cast<size_t>(blocks_for(rows).count) * static_cast<size_t>(experts) * sizeof(int32_t);
}

void group_by_expert(int64_t tokens, int32_t experts, int32_t top_k, Routing const& routing, bool overlap,
                     cudaStream_t stream) {
  if (tokens == 0) return;
  int64_t const rows = tokens * top_k;
  Blocks const blocks = blocks_for(rows);
  Choices const choices{routing.expert_of_choice, static_cast<int32_t>(rows), experts, blocks.stretch,
                        static_cast<int32_t*>(routing.group_scratch)};
  LaunchShape shape;
  shape.blocks = static_cast<unsigned>(blocks.count);
  shape.threads = kThreads;
  shape.overlap = overlap;
  shape.stream = stream;
  if (blocks.count > 1) {
    shape.shared_bytes = sizeof(int32_t) * static_cast<size_t>(experts);
    launch(&count_kernel, shape, choices, routing.counters);
  }
  shape.shared_bytes = sizeof(int32_t) * static_cast<size_t>(experts) * kWarps;
  launch(&place_kernel, shape, choices, routing.row_of_choice, routing.row_begin, routing.counts, routing.counters);
}

}  // namespace moe_infer
