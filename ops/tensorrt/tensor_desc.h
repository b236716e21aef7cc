// What TensorRT's tensor descriptions say about a layer's inputs, checked.
#pragma once

#include <NvInferRuntime.h>

#include "core/layer_config.h"

namespace moe_infer {

inline constexpr char const* kPluginVersion = "1";

inline constexpr int32_t kMostInputs = 3;  // hidden_states, router_logits, next_router_logits

// True for float32, float16 and bfloat16.
bool is_layer_type(nvinfer1::DataType type);
DataType to_data_type(nvinfer1::DataType type);
std::string type_text(nvinfer1::DataType type);

void check_input_count(int32_t count);
void check_rank(int32_t rank);
void check_output_count(int32_t count);

// Types and the last dimension. Throws Error(MOE_INFER_INVALID).
LayerInputs to_inputs(nvinfer1::PluginTensorDesc const& hidden_states, nvinfer1::PluginTensorDesc const* router_logits);
// Product of all dimensions but the last.
int64_t count_tokens(nvinfer1::Dims const& dims);
// Run time: router_logits must be (..., expert_count) with the tokens of hidden_states.
void check_logits(nvinfer1::Dims const& hidden_states, nvinfer1::Dims const& router_logits, int32_t expert_count);
// The same of next_router_logits, whose last dimension may be any.
void check_next_logits(nvinfer1::Dims const& hidden_states, nvinfer1::Dims const& next_logits);

}  // namespace moe_infer
