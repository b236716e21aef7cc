// Launches the kernel of a type, form and tile.
#pragma once

#include <algorithm>

#include "core/device_limits.h"
#include "core/launch.h"
#include "gemm/hopper.h"
#include "gemm/hopper_kernel.cuh"

namespace moe_infer::hopper {

// Stages fill the shared memory of a multiprocessor.
template <TileRows kRows, int kStages, int kStoreBuffers>
using TileOf = Tile<static_cast<int>(kRows), box_rows_of(kRows), kStages, kStoreBuffers, cluster_of(kRows)>;
using Tile32 = TileOf<TileRows::k32, 10, 2>;
using Tile64 = TileOf<TileRows::k64, 8, 2>;
using Tile128 = TileOf<TileRows::k128, 6, 2>;
using Tile288 = TileOf<TileRows::k288, 4, 1>;

template <class T, class TileT, bool kGated>
void launch_tile(Launch const& launch, Product const& product) {
  static_assert(kSharedBytes<TileT> <= 227 * 1024, "what a block can have");
  auto* const kernel = &grouped_kernel<T, TileT, kGated>;
  allow_shared_memory(reinterpret_cast<void const*>(kernel), kSharedBytes<TileT>);
  int64_t const clusters =
      std::min<int64_t>(multiprocessors() / TileT::kCluster, launch.most_row_tiles * product.blocks);
  LaunchShape shape;
  shape.blocks = static_cast<unsigned>(clusters * TileT::kCluster);
  shape.threads = kThreads;
  shape.shared_bytes = kSharedBytes<TileT>;
  shape.cluster = TileT::kCluster;
  shape.overlap = launch.overlap;
  shape.stream = launch.stream;
  moe_infer::launch(kernel, shape, launch.weights, launch.tokens, product);
}

template <class T, bool kGated>
void launch_type(Launch const& launch, Product const& product) {
  switch (launch.tile_rows) {
    case TileRows::k32:
      return launch_tile<T, Tile32, kGated>(launch, product);
    case TileRows::k64:
      return launch_tile<T, Tile64, kGated>(launch, product);
    case TileRows::k128:
      return launch_tile<T, Tile128, kGated>(launch, product);
    case TileRows::k288:
      return launch_tile<T, Tile288, kGated>(launch, product);
  }
}

}  // namespace moe_infer::hopper
