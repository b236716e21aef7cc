// Stable sort of the choices by expert (CUB's radix sort).
#pragma once

#include <cstddef>
#include <cstdint>

namespace moe_infer {

// Bytes of scratch for sorting `choices` expert numbers below `experts`.
size_t sort_scratch_bytes(size_t choices, int32_t experts);

}  // namespace moe_infer
