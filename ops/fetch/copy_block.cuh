// How warps copy what a call fetches, out of page-locked host memory.
#pragma once

#include <cstdint>

#include "fetch/arrivals.cuh"
#include "fetch/fetch_kernels.h"

namespace moe_infer {

constexpr int kCopyUnroll = 8;  // 16-byte loads in flight, a thread: the bus answers after more than a microsecond

// A warp. Source, destination and offset are multiples of 16 bytes; the last bytes may not be.
__device__ inline void copy_bytes(uint8_t const* source, uint8_t* destination, uint32_t bytes) {
  auto const* const from = reinterpret_cast<uint4 const*>(source);
  auto* const to = reinterpret_cast<uint4*>(destination);
  uint32_t const units = bytes / sizeof(uint4);
  uint32_t const lane = threadIdx.x % kCopyLanes;
  for (uint32_t first = lane; first < units; first += kCopyLanes * kCopyUnroll) {
    uint4 values[kCopyUnroll];
#pragma unroll
    for (uint32_t i = 0; i < kCopyUnroll; ++i) {
      if (first + i * kCopyLanes < units) values[i] = __ldcs(from + first + i * kCopyLanes);
    }
#pragma unroll
    for (uint32_t i = 0; i < kCopyUnroll; ++i) {
      if (first + i * kCopyLanes < units) to[first + i * kCopyLanes] = values[i];
    }
  }
  uint32_t const rest = units * sizeof(uint4) + lane;
  if (rest < bytes) destination[rest] = source[rest];
}

// A warp: a chunk of an item.
__device__ inline void copy_chunk(FetchSource const& source, FetchItem const& item, FetchChunk const& chunk) {
  uint8_t const* const tensor = source.tensors[static_cast<int64_t>(item.expert) * source.tensor_count + chunk.tensor];
  uint8_t* const slot = source.slots + static_cast<uint64_t>(item.slot) * source.slot_bytes;
  copy_bytes(tensor + chunk.offset, slot + chunk.offset_in_slot, chunk.bytes);
}

// Block `block` of `copy.blocks`; what was planned is there. Each warp goes its own way: while one tells that a chunk
// has come, the others copy, and at the end they end nearly together.
template <int kThreads>
__device__ void copy_in_block(ExpertCopy const& copy, uint32_t block) {
  constexpr uint32_t kWarps = kThreads / kCopyLanes;
  auto const& source = copy.source;
  auto const& tables = copy.tables;
  int64_t const chunks = static_cast<int64_t>(*tables.item_count) * source.chunk_count;
  for (int64_t i = block * kWarps + threadIdx.x / kCopyLanes; i < chunks; i += copy.blocks * kWarps) {
    auto const number = static_cast<int32_t>(i / source.chunk_count);
    FetchItem const item = tables.items[number];
    FetchChunk const chunk = source.chunks[i % source.chunk_count];
    copy_chunk(source, item, chunk);
    publish_chunk(&tables.chunks_done[number], chunk.late,
                  static_cast<uint32_t>(source.chunk_count - source.late_count),
                  static_cast<uint32_t>(source.late_count), &tables.arrivals.there[item.slot]);
  }
}

// Where the host copies: the first chunks of the first item, as many as copy.head_chunks, while the host notices what
// was ordered. Another block of the same kernel plans meanwhile; it was started before.
template <int kThreads>
__device__ void copy_head_in_block(ExpertCopy const& copy, uint32_t block) {
  constexpr uint32_t kWarps = kThreads / kCopyLanes;
  auto const& tables = copy.tables;
  if (threadIdx.x == 0) {
    while (load_acquire(tables.listed) != tables.orders.wanted) __nanosleep(50);
  }
  __syncthreads();
  if (__ldcg(tables.item_count) == 0) return;
  int2 const item = __ldcg(reinterpret_cast<int2 const*>(tables.items));
  uint32_t const chunk = block * kWarps + threadIdx.x / kCopyLanes;
  if (chunk < copy.head_chunks) copy_chunk(copy.source, {item.x, item.y}, copy.source.chunks[chunk]);
}

}  // namespace moe_infer
