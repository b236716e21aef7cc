// Which group a row belongs to, on the device. Groups are ascending in their rows; some may be empty.
#pragma once

#include <cstdint>

#include "sublayers/sub_layer.h"

namespace moe_infer {

// Rows [first_row, end_row) hold all groups.
__device__ inline int64_t first_row(ExpertGroups const& groups) { return groups.row_begin[0]; }
__device__ inline int64_t end_row(ExpertGroups const& groups) { return groups.row_end[groups.count - 1]; }

// The last of `count` groups that begins at or before `place`, -1: none does. `begin` says where a group begins: groups
// are ascending in that.
template <class Place, class Begin>
__device__ inline int32_t last_group_before(int32_t count, Place place, Begin const& begin) {
  int32_t low = 0;  // groups before `low` begin at or before the place
  int32_t high = count;
  while (low < high) {
    int32_t const middle = low + (high - low) / 2;
    if (begin(middle) <= place) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low - 1;
}

// The group of `row`, or -1. Of the groups that begin at or before the row only the last can hold it: an empty group
// begins where the next one does, and the search passes it.
__device__ inline int32_t group_of_row(ExpertGroups const& groups, int64_t row) {
  int32_t const last = last_group_before(groups.count, row, [&](int32_t g) { return groups.row_begin[g]; });
  return last >= 0 && row < groups.row_end[last] ? last : -1;
}

// Where tensor at `offset` of the group's expert lies.
__device__ inline uint8_t const* expert_tensor(ExpertGroups const& groups, int32_t group, uint64_t offset) {
  return groups.slots + static_cast<uint64_t>(groups.slot_of_group[group]) * groups.slot_bytes + offset;
}

}  // namespace moe_infer
