// From a layer's configuration to what its sub-layer is made from.
#pragma once

#include <cstdint>

#include "core/layer_config.h"
#include "sublayers/sub_layer.h"

namespace moe_infer {

// The type matters only for where tensors lie in a slot, not for what they are.
inline SubLayerShape sub_layer_shape(LayerConfig const& config, int64_t d_model, DataType dtype = DataType::kFloat32) {
  SubLayerShape shape;
  shape.d_model = d_model;
  shape.hidden_size = config.hidden_size;
  shape.dtype = dtype;
  shape.bias = config.expert_bias;
  shape.activation_alpha = config.activation_alpha;
  shape.activation_beta = config.activation_beta;
  shape.swiglu_limit = config.swiglu_limit;
  return shape;
}

}  // namespace moe_infer
