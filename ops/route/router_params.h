// What a router computes from a token's scores, in the form that kernels take.
#pragma once

#include <cstdint>

#include "core/layer_config.h"

namespace moe_infer {

// A layer's router. Handed to kernels by value.
struct RouterParams {
  Router router = Router::kDefault;
  bool normalize = false;  // divide the chosen weights by their sum
  int32_t experts = 1;
  int32_t top_k = 1;
  int32_t n_group = 1;
  int32_t topk_group = 1;  // as many as n_group: no limit
  float scaling_factor = 1.0F;
  float jitter = 0.01F;                // sparse_mixer
  float const* router_bias = nullptr;  // (experts) on the device, sigmoid_topk; nullptr: none
};

}  // namespace moe_infer
