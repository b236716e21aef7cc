// What the copy of a piece into its packed tensor does, on the host.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/expert_store.h"

namespace moe_infer {

inline void place_rows(ExpertStore const& store, ExpertPiece const& piece, uint8_t* tensor) {
  auto const row = static_cast<size_t>(piece.columns) * size_of(piece.dtype);
  for (int64_t i = 0; i < piece.rows; ++i) {
    auto const to = static_cast<size_t>(piece.first_row + i * piece.row_stride);
    store.read(piece, static_cast<uint64_t>(i) * row, tensor + to * row, row);
  }
}

}  // namespace moe_infer
