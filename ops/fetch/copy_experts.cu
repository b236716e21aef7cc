#include "core/grid_dependency.cuh"
#include "core/launch.h"
#include "fetch/arrivals.cuh"
#include "fetch/fetch_kernels.h"

namespace moe_infer {
namespace {

constexpr int kThreads = 512;
constexpr int kUnroll = 8;  // 16-byte loads in flight, a thread: the bus answers after more than a microsecond

// A block copies a chunk, whose source, destination and offset are multiples of 16 bytes; the last bytes may not be.
__device__ void copy_chunk(uint8_t const* source, uint8_t* destination, uint32_t bytes) {
  auto const* const from = reinterpret_cast<uint4 const*>(source);
  auto* const to = reinterpret_cast<uint4*>(destination);
  uint32_t const units = bytes / sizeof(uint4);
  for (uint32_t first = threadIdx.x; first < units; first += kThreads * kUnroll) {
    uint4 values[kUnroll];
#pragma unroll
    for (uint32_t i = 0; i < kUnroll; ++i) {
      if (first + i * kThreads < units) values[i] = __ldcs(from + first + i * kThreads);
    }
#pragma unroll
    for (uint32_t i = 0; i < kUnroll; ++i) {
      if (first + i * kThreads < units) to[first + i * kThreads] = values[i];
    }
  }
  uint32_t const rest = units * sizeof(uint4) + threadIdx.x;
  if (rest < bytes) destination[rest] = source[rest];
}

__global__ void __launch_bounds__(kThreads) copy_kernel(FetchSource const source, FetchTables const tables) {
  wait_for_previous_kernel();
  start_next_kernel();
  int32_t const items = *tables.item_count;
  int64_t const chunks = static_cast<int64_t>(items) * source.chunk_count;
  for (int64_t i = blockIdx.x; i < chunks; i += gridDim.x) {
    auto const item = static_cast<int32_t>(i / source.chunk_count);
    FetchItem const fetch = tables.items[item];
    FetchChunk const chunk = source.chunks[i % source.chunk_count];
    uint8_t const* const tensor =
        source.tensors[static_cast<int64_t>(fetch.expert) * source.tensor_count + chunk.tensor];
    copy_chunk(tensor + chunk.offset,
               source.slots + static_cast<uint64_t>(fetch.slot) * source.slot_bytes + chunk.offset_in_slot,
               chunk.bytes);
    publish_chunk(&tables.chunks_done[item], static_cast<uint32_t>(source.chunk_count), &tables.there[fetch.slot]);
  }
}

}  // namespace

void copy_experts(FetchSource const& source, FetchTables const& tables, unsigned blocks, bool overlap,
                  cudaStream_t stream) {
  LaunchShape shape;
  shape.blocks = blocks;
  shape.threads = kThreads;
  shape.overlap = overlap;
  shape.stream = stream;
  launch(&copy_kernel, shape, source, tables);
}

}  // namespace moe_infer
