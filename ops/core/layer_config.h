// The operator's attributes, parsed and checked. The rules and texts are those of moe_infer/op/layer_config.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/data_type.h"
#include "moe_infer.h"

namespace moe_infer {

inline constexpr int32_t kMaxExperts = 1024;
inline constexpr int32_t kMaxHiddenSize = (1 << 30) - 1;
inline constexpr float kRmsNormEpsilon = 1e-6F;

enum class Router : int32_t {
  kDefault,
  kCpm2,
  kBaseLayer,
  kSoftmaxTopK,
  kTopKSoftmax,
  kSigmoidTopK,
  kSparseMixer,
};

struct LayerInputs {
  int64_t d_model = 0;
  DataType dtype = DataType::kFloat32;
  bool has_logits = false;
  DataType logits_dtype = DataType::kFloat32;
};

struct LayerConfig {
  int32_t expert_count = 0;
  int32_t hidden_size = 0;
  std::string sublayer_type;
  std::string weight_file;
  std::string weight_prefix;
  std::string weight_digest;
  int32_t max_concurrency = 2;
  int32_t top_k = 1;
  Router router = Router::kDefault;
  bool normalize_routing_weights = false;
  std::optional<std::vector<float>> router_bias;  // (expert_count)
  int32_t n_group = 1;
  int32_t topk_group = 0;
  float routed_scaling_factor = 1.0F;
  float router_jitter = 0.01F;
  std::optional<std::vector<float>> centroids;         // (d_model, expert_count)
  std::optional<std::vector<float>> layernorm_weight;  // (d_model)
  bool expert_bias = false;
  float activation_alpha = 1.702F;
  float activation_beta = 1.0F;
  float swiglu_limit = 7.0F;  // 0: none
  int32_t embedding_size = 0;

  // Parses and checks everything that does not need the inputs. Throws Error(MOE_INFER_INVALID).
  static LayerConfig from_attributes(moe_infer_attribute const* attributes, int32_t count);
  // Checks what depends on the inputs.
  void check_inputs(LayerInputs const& inputs) const;

  // Groups from which a token chooses its experts.
  int32_t chosen_groups() const { return topk_group == 0 ? n_group : topk_group; }
  bool resident() const { return max_concurrency >= expert_count; }
};

}  // namespace moe_infer
