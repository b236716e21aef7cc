// How a block copies its part of what a call fetches, out of page-locked host memory.
#pragma once

#include <cstdint>

#include "fetch/arrivals.cuh"
#include "fetch/fetch_kernels.h"

namespace moe_infer {

constexpr int kCopyUnroll = 8;  // 16-byte loads in flight, a thread: the bus answers after more than a microsecond

// Source, destination and offset are multiples of 16 bytes; the last bytes may not be.
template <int kThreads>
__device__ void copy_chunk(uint8_t const* source, uint8_t* destination, uint32_t bytes) {
  auto const* const from = reinterpret_cast<uint4 const*>(source);
  auto* const to = reinterpret_cast<uint4*>(destination);
  uint32_t const units = bytes / sizeof(uint4);
  for (uint32_t first = threadIdx.x; first < units; first += kThreads * kCopyUnroll) {
    uint4 values[kCopyUnroll];
#pragma unroll
    for (uint32_t i = 0; i < kCopyUnroll; ++i) {
      if (first + i * kThreads < units) values[i] = __ldcs(from + first + i * kThreads);
    }
#pragma unroll
    for (uint32_t i = 0; i < kCopyUnroll; ++i) {
      if (first + i * kThreads < units) to[first + i * kThreads] = values[i];
    }
  }
  uint32_t const rest = units * sizeof(uint4) + threadIdx.x;
  if (rest < bytes) destination[rest] = source[rest];
}

// Chunk `chunk` of an item.
template <int kThreads>
__device__ void copy_chunk_of(FetchSource const& source, FetchItem const& item, FetchChunk const& chunk) {
  uint8_t const* const tensor = source.tensors[static_cast<int64_t>(item.expert) * source.tensor_count + chunk.tensor];
  uint8_t* const slot = source.slots + static_cast<uint64_t>(item.slot) * source.slot_bytes;
  copy_chunk<kThreads>(tensor + chunk.offset, slot + chunk.offset_in_slot, chunk.bytes);
}

// Block `block` of `copy.blocks`; plan_in_block's results are there.
template <int kThreads>
__device__ void copy_in_block(ExpertCopy const& copy, uint32_t block) {
  auto const& source = copy.source;
  auto const& tables = copy.tables;
  int64_t const chunks = static_cast<int64_t>(*tables.item_count) * source.chunk_count;
  for (int64_t i = block; i < chunks; i += copy.blocks) {
    auto const item = static_cast<int32_t>(i / source.chunk_count);
    FetchItem const fetch = tables.items[item];
    FetchChunk const chunk = source.chunks[i % source.chunk_count];
    copy_chunk_of<kThreads>(source, fetch, chunk);
    publish_chunk(&tables.chunks_done[item], chunk.late, static_cast<uint32_t>(source.chunk_count - source.late_count),
                  static_cast<uint32_t>(source.late_count), &tables.arrivals.there[fetch.slot]);
  }
}

// Where the host copies: the first chunks of the first item, one a block, while the host notices what was ordered.
// Another block of the same kernel plans meanwhile; it was started before.
template <int kThreads>
__device__ void copy_head_in_block(ExpertCopy const& copy, uint32_t block) {
  auto const& tables = copy.tables;
  if (threadIdx.x == 0) {
    while (load_acquire(tables.listed) != tables.orders.wanted) __nanosleep(50);
  }
  __syncthreads();
  if (__ldcg(tables.item_count) == 0) return;
  int2 const item = __ldcg(reinterpret_cast<int2 const*>(tables.items));
  copy_chunk_of<kThreads>(copy.source, {item.x, item.y}, copy.source.chunks[block]);
}

}  // namespace moe_infer
