// How much scratch group.cu needs; Routing::layout is the only caller.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moe_infer {

// Bytes for the counts of its blocks.
size_t group_scratch_bytes(int64_t rows, int32_t experts);

}  // namespace moe_infer
