// Launches the kernel of a type, form and tile.
#pragma once

#include <algorithm>

#include "core/device_limits.h"
#include "core/launch.h"
#include "gemm/hopper.h"
#include "gemm/hopper_kernel.cuh"

namespace moe_infer::hopper {

// Stages fill the shared memory of a multiprocessor.
using Tile32 = Tile<32, 10, cluster_of(TileRows::k32)>;
using Tile64 = Tile<64, 8, cluster_of(TileRows::k64)>;
using Tile128 = Tile<128, 6, cluster_of(TileRows::k128)>;
using Tile256 = Tile<256, 4, cluster_of(TileRows::k256)>;

template <class T, class TileT, bool kGated>
void launch_tile(Launch const& launch, Product const& product) {
  static_assert(kSharedBytes<TileT> <= 227 * 1024, "what a block can have");
  static_assert(TileT::kBoxRows == TileT::kTokens / 4 && TileT::kBoxRows <= 256, "hopper.h");
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
    case TileRows::k256:
      return launch_tile<T, Tile256, kGated>(launch, product);
  }
}

}  // namespace moe_infer::hopper
