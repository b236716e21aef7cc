// What sub-layers do to rows one by one, between their matrix products.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/data_type.h"
#include "sublayers/sub_layer.h"

namespace moe_infer {

// output row = weight * input row / sqrt(mean(square) + 1e-6), with the weight (d_model) of the row's expert at
// `weight_offset` in its slot. Arithmetic in float32, rounded once.
void rms_norm_rows(SubLayerCall const& call, DataType dtype, int64_t d_model, uint64_t weight_offset, void* output);

}  // namespace moe_infer
