// Device-side helpers for sub-layers: which rows a call covers, and which expert a row belongs to.
#pragma once

#include "sublayers/sub_layer.h"

namespace moe_infer {

// The rows of a call. Its groups are consecutive experts, so their rows are one span.
struct RowSpan {
  int64_t begin, end;
  __device__ explicit RowSpan(ExpertGroups const& groups)
      : begin(groups.row_begin[0]), end(groups.row_end[groups.count - 1]) {}
};

// Slot of the expert that row belongs to: that of the first group which ends after the row.
__device__ inline uint8_t const* slot_of_row(ExpertGroups const& groups, int64_t row) {
  int low = 0;
  int high = groups.count - 1;
  while (low < high) {
    int const middle = (low + high) / 2;
    if (groups.row_end[middle] > row) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return groups.slots + static_cast<uint64_t>(groups.slot_of_group[low]) * groups.slot_bytes;
}

}  // namespace moe_infer
