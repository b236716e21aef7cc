#include "tensorrt/tensor_desc.h"

#include <string>

#include "core/error.h"

namespace moe_infer {
namespace {

std::string dims_text(nvinfer1::Dims const& dims) {
  std::string text = "(";
  for (int32_t i = 0; i < dims.nbDims; ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(dims.d[i]);
  }
  return text + ")";
}

// Whether logits have a row for each token.
bool has_row_for_each(nvinfer1::Dims const& hidden_states, nvinfer1::Dims const& logits) {
  return logits.nbDims >= 1 && count_tokens(logits) == count_tokens(hidden_states);
}

}  // namespace

bool is_layer_type(nvinfer1::DataType type) {
  return type == nvinfer1::DataType::kFLOAT || type == nvinfer1::DataType::kHALF || type == nvinfer1::DataType::kBF16;
}

std::string type_text(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT:
      return "float32";
    case nvinfer1::DataType::kHALF:
      return "float16";
    case nvinfer1::DataType::kBF16:
      return "bfloat16";
    case nvinfer1::DataType::kINT8:
      return "int8";
    case nvinfer1::DataType::kINT32:
      return "int32";
    case nvinfer1::DataType::kINT64:
      return "int64";
    case nvinfer1::DataType::kBOOL:
      return "bool";
    default:
      return "TensorRT type number " + std::to_string(static_cast<int32_t>(type));
  }
}

DataType to_data_type(nvinfer1::DataType type) {
  if (!is_layer_type(type)) {
    throw invalid("MoELayer: inputs must be float32, float16 or bfloat16, got " + type_text(type));
  }
  return type == nvinfer1::DataType::kFLOAT  ? DataType::kFloat32
         : type == nvinfer1::DataType::kHALF ? DataType::kFloat16
                                             : DataType::kBFloat16;
}

void check_input_count(int32_t count) {
  if (count < 1 || count > kMostInputs) {
    throw invalid("MoELayer: takes hidden_states and optionally router_logits and next_router_logits, got " +
                  std::to_string(count) + " inputs");
  }
}

void check_output_count(int32_t count) {
  if (count != 1) {
    throw invalid("MoELayer: has 1 output, got " + std::to_string(count));
  }
}

void check_rank(int32_t rank) {
  if (rank != 2 && rank != 3) {
    throw invalid("MoELayer: hidden_states must have shape (tokens, d_model) or (batch, seq, d_model), got rank " +
                  std::to_string(rank));
  }
}

LayerInputs to_inputs(nvinfer1::PluginTensorDesc const& hidden_states,
                      nvinfer1::PluginTensorDesc const* router_logits) {
  check_rank(hidden_states.dims.nbDims);
  LayerInputs inputs;
  inputs.d_model = hidden_states.dims.d[hidden_states.dims.nbDims - 1];
  inputs.dtype = to_data_type(hidden_states.type);
  inputs.has_logits = router_logits != nullptr;
  if (inputs.has_logits) {
    inputs.logits_dtype = to_data_type(router_logits->type);
  }
  return inputs;
}

int64_t count_tokens(nvinfer1::Dims const& dims) {
  int64_t tokens = 1;
  for (int32_t i = 0; i + 1 < dims.nbDims; ++i) {
    if (dims.d[i] < 0 || __builtin_mul_overflow(tokens, static_cast<int64_t>(dims.d[i]), &tokens)) {
      throw invalid("MoELayer: hidden_states has shape " + dims_text(dims));
    }
  }
  return tokens;
}

void check_next_logits(nvinfer1::Dims const& hidden_states, nvinfer1::Dims const& next_logits) {
  if (!has_row_for_each(hidden_states, next_logits)) {
    throw invalid("MoELayer: next_router_logits must have a row for each token of hidden_states " +
                  dims_text(hidden_states) + ", got shape " + dims_text(next_logits));
  }
}

void check_logits(nvinfer1::Dims const& hidden_states, nvinfer1::Dims const& router_logits, int32_t expert_count) {
  if (!has_row_for_each(hidden_states, router_logits) || router_logits.d[router_logits.nbDims - 1] != expert_count) {
    throw invalid("MoELayer: router_logits must have a row of expert_count = " + std::to_string(expert_count) +
                  " for each token of hidden_states " + dims_text(hidden_states) + ", got shape " +
                  dims_text(router_logits));
  }
}

}  // namespace moe_infer
