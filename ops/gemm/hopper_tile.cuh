// What the parts of the Hopper kernel share: sizes, what a launch is given, a block's shared memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/layer_config.h"
#include "gemm/activation.cuh"
#include "gemm/hopper_units.cuh"
#include "sublayers/sub_layer.h"

namespace moe_infer::hopper {

constexpr int kWeightRows = 128;  // of a unit in one block
constexpr int kDepth = 64;        // of k in a stage: 128 bytes, the width of the swizzle
constexpr int kRowBytes = 128;
constexpr int kWeightStage = kWeightRows * kRowBytes;
constexpr int kMultipliers = 2;  // warpgroups
constexpr int kMultiplierWarps = 4 * kMultipliers;
constexpr int kThreads = 128 * (1 + kMultipliers);
constexpr int kStoredRows = 32;  // rows that the epilogue stores at a time
constexpr int kStoreBytes = kStoredRows * kRowBytes;

// What a kernel is given besides the maps of its operands.
struct Product {
  ExpertGroups groups;
  int32_t blocks = 0;    // of channels, 128 * cluster weight rows each
  int32_t k_steps = 0;   // of kDepth
  int32_t channels = 0;  // columns of the output
  void* output = nullptr;
  void const* source = nullptr;  // (rows, channels), added; nullptr: none
  uint64_t bias_offset = 0;      // in a slot
  bool has_bias = false;
  Activation activation;
  int32_t* counters = nullptr;
  bool after_fetch = false;  // the kernel before copies experts (ExpertGroups::arrivals): do not wait for it
};

// kTokens rows of the input at most, in copies of kBoxRows.
template <int kTokens_, int kBoxRows_, int kStages_, int kStoreBuffers_, int kCluster_>
struct Tile {
  static constexpr int kTokens = kTokens_;
  static constexpr int kStages = kStages_;
  static constexpr int kCluster = kCluster_;
  static constexpr int kBoxRows = kBoxRows_;
  static constexpr int kStoreBuffers = kStoreBuffers_;
  static constexpr int kTokenStage = kTokens * kRowBytes;
  static_assert(kBoxRows % 8 == 0 && kTokens % kBoxRows == 0, "the swizzle repeats every 8 rows");
};

template <class TileT>
struct SharedStorage {
  alignas(1024) uint8_t weights[TileT::kStages][kWeightStage];
  alignas(1024) uint8_t tokens[TileT::kStages][TileT::kTokenStage];
  alignas(1024) uint8_t store[kMultipliers][TileT::kStoreBuffers][kStoreBytes];
  alignas(16) UnitQueue queue;
  uint64_t full[TileT::kStages];
  uint64_t empty[TileT::kStages];
  int32_t units_end[kMaxExperts];
};
template <class TileT>
constexpr size_t kSharedBytes = sizeof(SharedStorage<TileT>) + 1024;  // the address may have to be rounded up

}  // namespace moe_infer::hopper
