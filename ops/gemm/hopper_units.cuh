// How the blocks of the Hopper kernel share out a grouped product: in units of one tile of rows times one block of
// channels, claimed in order from a counter. Claimed and not dealt out, because experts' tiles differ in their rows and
// blocks begin at different times.
#pragma once

#include <cstdint>

#include "core/layer_config.h"
#include "gemm/group_search.cuh"
#include "gemm/hopper_primitives.cuh"
#include "sublayers/sub_layer.h"

namespace moe_infer::hopper {

struct alignas(16) Unit {
  int32_t row;    // first row of input and output
  int32_t rows;   // of the tile that exist; 0: there are no more units
  int32_t block;  // of channels
  int32_t slot;   // of the expert
};

constexpr int kQueueDepth = 2;

// Units on their way from the scheduler to those who work on them, in the shared memory of each block of the cluster.
struct UnitQueue {
  Unit units[kQueueDepth];
  uint64_t full[kQueueDepth];
  uint64_t empty[kQueueDepth];  // counted in the first block only
  uint64_t wanted;              // the first block's copying warp is about to need the next unit

  __device__ void init(uint32_t readers) {
    for (int i = 0; i < kQueueDepth; ++i) {
      barrier_init(&full[i], 1);
      barrier_init(&empty[i], readers);
    }
    barrier_init(&wanted, 1);
  }
};

// A place in a ring of kCount buffers, each with barriers whose phases alternate.
template <int kCount>
struct RingPlace {
  uint32_t index = 0;
  uint32_t phase = 0;
  __device__ void next() {
    if (++index == kCount) {
      index = 0;
      phase ^= 1;
    }
  }
};
using QueuePlace = RingPlace<kQueueDepth>;

// One thread takes the next unit: waits for it, and says that its place may be filled again.
template <int kCluster>
__device__ inline Unit take_unit_alone(UnitQueue* queue, QueuePlace* place) {
  if constexpr (kCluster == 1) {
    barrier_wait(&queue->full[place->index], place->phase);
  } else {
    barrier_wait_cluster(&queue->full[place->index], place->phase);
  }
  Unit const unit = queue->units[place->index];
  if constexpr (kCluster == 1) {
    barrier_arrive(&queue->empty[place->index]);
  } else {
    barrier_arrive_at(&queue->empty[place->index], 0);
  }
  place->next();
  return unit;
}

// A warp does: its first thread, which tells the others. Thus the thread that read is the thread that arrives at the
// barrier, which orders its read before the next write without the help of a __syncwarp.
template <int kCluster>
__device__ inline Unit take_unit(UnitQueue* queue, QueuePlace* place) {
  Unit unit{};
  if (threadIdx.x % 32 == 0) {
    unit = take_unit_alone<kCluster>(queue, place);
  } else {
    place->next();
  }
  return {__shfl_sync(0xffffffffU, unit.row, 0), __shfl_sync(0xffffffffU, unit.rows, 0),
          __shfl_sync(0xffffffffU, unit.block, 0), __shfl_sync(0xffffffffU, unit.slot, 0)};
}

// Within an expert: up to kTilesTogether tiles of rows, all channels of them with the tile changing fastest, then the
// next tiles. What is in use at a time stays in the L2 cache: these tiles of the input, and each weight for them all.
constexpr int32_t kTilesTogether = 16;

struct UnitsOfGroups {
  ExpertGroups groups;
  int32_t tile_rows;   // most rows of a tile
  int32_t grain;       // rows by which tiles differ
  int32_t blocks;      // of channels
  int32_t const* end;  // (groups.count), shared memory: units of groups 0 .. g

  __device__ Unit at(int32_t index) const {
    auto const first_unit = [this](int32_t g) { return g == 0 ? 0 : end[g - 1]; };
    int32_t const group = last_group_before(groups.count, index, first_unit);  // the first one has unit 0
    if (index >= end[group]) return {0, 0, 0, 0};
    int32_t const local = index - first_unit(group);
    int32_t const begin = groups.row_begin[group];
    int32_t const rows = groups.row_end[group] - begin;
    int32_t const tiles = (rows + tile_rows - 1) / tile_rows;
    int32_t const first_tile = local / (kTilesTogether * blocks) * kTilesTogether;
    int32_t const together = min(kTilesTogether, tiles - first_tile);
    int32_t const rest = local - first_tile * blocks;
    int32_t const tile = first_tile + rest % together;
    // Tiles of an expert are as equal as grains allow: a small one at the end would cost its weights all the same.
    int32_t const grains = (rows + grain - 1) / grain;
    int32_t const least = grains / tiles;
    int32_t const larger = grains % tiles;  // tiles with one grain more; they come first
    int32_t const first_row = (tile * least + min(tile, larger)) * grain;
    int32_t const size = (least + (tile < larger ? 1 : 0)) * grain;
    return {begin + first_row, min(size, rows - first_row), rest / together, groups.slot_of_group[group]};
  }
};

// One warp: sums up the units of the groups.
__device__ inline void count_units(ExpertGroups const& groups, int32_t tile_rows, int32_t blocks, int32_t* end) {
  int32_t const lane = static_cast<int32_t>(threadIdx.x) % 32;
  int32_t before = 0;
  for (int32_t first = 0; first < groups.count; first += 32) {
    int32_t const g = first + lane;
    int32_t units = 0;
    if (g < groups.count) units = (groups.row_end[g] - groups.row_begin[g] + tile_rows - 1) / tile_rows * blocks;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      int32_t const other = __shfl_up_sync(0xffffffffU, units, offset);
      if (lane >= offset) units += other;
    }
    if (g < groups.count) end[g] = before + units;
    before += __shfl_sync(0xffffffffU, units, 31);
  }
  __syncwarp();
}

// The warp that claims units for its cluster until there are none, each only when it is wanted: one that was claimed
// early is missed by a cluster that is done. `counters`: two, zero before the launch and again
// after it, however many launches share them one after the other.
template <int kCluster>
__device__ void schedule_units(UnitQueue* queue, UnitsOfGroups const& units, int32_t* counters, int32_t clusters) {
  if (threadIdx.x % 32 != 0) return;
  QueuePlace place;
  for (uint32_t wanted_phase = 0;; wanted_phase ^= 1) {
    barrier_wait(&queue->wanted, wanted_phase);
    Unit const unit = units.at(atomicAdd(&counters[0], 1));
    barrier_wait(&queue->empty[place.index], place.phase ^ 1);
    if constexpr (kCluster == 1) {
      queue->units[place.index] = unit;
      barrier_arrive(&queue->full[place.index]);
    } else {
#pragma unroll
      for (uint32_t rank = 0; rank < kCluster; ++rank) {
        uint32_t const to = cluster_address(shared_address(&queue->units[place.index]), rank);
        asm volatile("st.shared::cluster.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(unit.row), "r"(unit.rows),
                     "r"(unit.block), "r"(unit.slot)
                     : "memory");
        barrier_publish_at(&queue->full[place.index], rank);
      }
    }
    place.next();
    if (unit.rows == 0) break;
  }
  // Every cluster claims exactly one unit too many; when the last has done so, nobody counts any more.
  __threadfence();
  if (atomicAdd(&counters[1], 1) == clusters - 1) {
    counters[0] = 0;
    counters[1] = 0;
  }
}

}  // namespace moe_infer::hopper
