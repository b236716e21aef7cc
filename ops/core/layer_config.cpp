// The rules, their order and their texts are those of moe_infer/op/layer_config.py;
// tests/test_native_check.py compares the two.
#include "core/layer_config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "core/error.h"
#include "sublayers/sub_layer.h"

namespace moe_infer {
namespace {

struct RouterName {
  char const* name;
  Router router;
  int32_t most_experts;  // largest top_k
};

constexpr std::array<RouterName, 7> kRouters{{{"default", Router::kDefault, 1},
                                              {"cpm_2", Router::kCpm2, 1},
                                              {"base_layer", Router::kBaseLayer, 1},
                                              {"softmax_topk", Router::kSoftmaxTopK, kMaxExperts},
                                              {"topk_softmax", Router::kTopKSoftmax, kMaxExperts},
                                              {"sigmoid_topk", Router::kSigmoidTopK, kMaxExperts},
                                              {"sparse_mixer", Router::kSparseMixer, 2}}};

// What the attributes say, before the checks.
struct Attributes {
  LayerConfig config;
  std::string variant = "default";
  int32_t normalize = 0;
  int32_t expert_bias = 0;
};

using Floats = std::optional<std::vector<float>>;

// One attribute of the operator: its name, its kind, and where its value goes (the member that is set).
struct Field {
  char const* name;
  moe_infer_attribute_kind kind;
  bool required;
  int32_t& (*integer)(Attributes&);
  float& (*number)(Attributes&);
  std::string& (*string)(Attributes&);
  Floats& (*floats)(Attributes&);
};

constexpr Field int_field(char const* name, bool required, int32_t& (*value)(Attributes&)) {
  return {name, MOE_INFER_INT32, required, value, nullptr, nullptr, nullptr};
}
constexpr Field float_field(char const* name, float& (*value)(Attributes&)) {
  return {name, MOE_INFER_FLOAT, false, nullptr, value, nullptr, nullptr};
}
constexpr Field string_field(char const* name, bool required, std::string& (*value)(Attributes&)) {
  return {name, MOE_INFER_STRING, required, nullptr, nullptr, value, nullptr};
}
constexpr Field floats_field(char const* name, Floats& (*value)(Attributes&)) {
  return {name, MOE_INFER_FLOATS, false, nullptr, nullptr, nullptr, value};
}

// In the order of ATTRIBUTES in moe_infer/op/attributes.py, in which missing ones are reported.
constexpr std::array<Field, 22> kFields{{
    int_field("expert_count", true, [](Attributes& a) -> int32_t& { return a.config.expert_count; }),
    int_field("hidden_size", true, [](Attributes& a) -> int32_t& { return a.config.hidden_size; }),
    string_field("expert_sublayer_type", true, [](Attributes& a) -> std::string& { return a.config.sublayer_type; }),
    string_field("expert_weight_file", false, [](Attributes& a) -> std::string& { return a.config.weight_file; }),
    string_field("expert_weight_prefix", false, [](Attributes& a) -> std::string& { return a.config.weight_prefix; }),
    string_field("expert_weight_digest", false, [](Attributes& a) -> std::string& { return a.config.weight_digest; }),
    int_field("max_concurrency", false, [](Attributes& a) -> int32_t& { return a.config.max_concurrency; }),
    int_field("top_k", false, [](Attributes& a) -> int32_t& { return a.config.top_k; }),
    string_field("moe_variant", false, [](Attributes& a) -> std::string& { return a.variant; }),
    int_field("normalize_routing_weights", false, [](Attributes& a) -> int32_t& { return a.normalize; }),
    floats_field("router_bias", [](Attributes& a) -> Floats& { return a.config.router_bias; }),
    int_field("n_group", false, [](Attributes& a) -> int32_t& { return a.config.n_group; }),
    int_field("topk_group", false, [](Attributes& a) -> int32_t& { return a.config.topk_group; }),
    float_field("routed_scaling_factor", [](Attributes& a) -> float& { return a.config.routed_scaling_factor; }),
    float_field("router_jitter", [](Attributes& a) -> float& { return a.config.router_jitter; }),
    floats_field("expert_centroids", [](Attributes& a) -> Floats& { return a.config.centroids; }),
    floats_field("layernorm_weight", [](Attributes& a) -> Floats& { return a.config.layernorm_weight; }),
    int_field("expert_bias", false, [](Attributes& a) -> int32_t& { return a.expert_bias; }),
    float_field("activation_alpha", [](Attributes& a) -> float& { return a.config.activation_alpha; }),
    float_field("activation_beta", [](Attributes& a) -> float& { return a.config.activation_beta; }),
    float_field("swiglu_limit", [](Attributes& a) -> float& { return a.config.swiglu_limit; }),
    int_field("embedding_size", false, [](Attributes& a) -> int32_t& { return a.config.embedding_size; }),
}};

std::string quoted(std::string const& text) { return "'" + text + "'"; }

std::string attribute(std::string const& name) { return "MoELayer: attribute " + quoted(name); }

std::string kind_name(int32_t kind) {
  switch (kind) {
    case MOE_INFER_INT32:
      return "int";
    case MOE_INFER_FLOATS:
      return "floats";
    case MOE_INFER_STRING:
      return "string";
    case MOE_INFER_FLOAT:
      return "float";
    default:
      return "kind number " + std::to_string(kind);
  }
}

// As Python's format 'g'.
std::string number_text(float value) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%g", static_cast<double>(value));
  return text.data();
}

std::string joined(std::vector<std::string> names) {
  std::sort(names.begin(), names.end());
  std::string text;
  for (auto const& name : names) {
    text += (text.empty() ? "" : ", ") + name;
  }
  return text;
}

std::string known_attributes() {
  std::vector<std::string> names;
  for (auto const& field : kFields) {
    names.emplace_back(field.name);
  }
  return joined(names);
}

// --- One attribute.

// An int or a float.
template <class T>
T read_one(moe_infer_attribute const& given) {
  if (given.count != 1) {
    throw invalid(attribute(given.name) + " must have 1 value, got " + std::to_string(given.count));
  }
  T value = 0;
  std::memcpy(&value, given.data, sizeof(value));
  return value;
}

// TensorRT counts the final NUL of strings from ONNX; from its Python API they come with or without.
std::string read_string(moe_infer_attribute const& given) {
  std::string value(static_cast<char const*>(given.data), static_cast<size_t>(given.count));
  value.erase(value.find_last_not_of('\0') + 1);
  auto const nul = value.find('\0');
  if (nul != std::string::npos) {
    throw invalid(attribute(given.name) + " has a NUL character at position " + std::to_string(nul));
  }
  return value;
}

std::vector<float> read_floats(moe_infer_attribute const& given) {
  std::vector<float> values(static_cast<size_t>(given.count));
  if (!values.empty()) {
    std::memcpy(values.data(), given.data, values.size() * sizeof(float));
  }
  return values;
}

void read_attribute(moe_infer_attribute const& given, Field const& field, Attributes* attributes) {
  if (given.kind != field.kind) {
    throw invalid(attribute(given.name) + " must be of type " + kind_name(field.kind) + ", got " +
                  kind_name(given.kind));
  }
  if (given.count < 0 || (given.data == nullptr && given.count > 0)) {
    throw invalid(attribute(given.name) + " has no data: length " + std::to_string(given.count));
  }
  if (field.kind == MOE_INFER_INT32) {
    field.integer(*attributes) = read_one<int32_t>(given);
  } else if (field.kind == MOE_INFER_FLOAT) {
    field.number(*attributes) = read_one<float>(given);
  } else if (field.kind == MOE_INFER_STRING) {
    field.string(*attributes) = given.count == 0 ? "" : read_string(given);
  } else {
    field.floats(*attributes) = read_floats(given);
  }
}

// --- Checks.

void check_range(char const* name, int32_t value, int32_t low, int32_t high = std::numeric_limits<int32_t>::max()) {
  if (value < low || value > high) {
    auto const expected = high == std::numeric_limits<int32_t>::max()
                              ? "at least " + std::to_string(low)
                              : std::to_string(low) + " to " + std::to_string(high);
    throw invalid(attribute(name) + " must be " + expected + ", got " + std::to_string(value));
  }
}

void check_one_of(char const* name, std::string const& value, std::vector<std::string> const& known) {
  if (std::find(known.begin(), known.end(), value) == known.end()) {
    throw invalid(attribute(name) + " is " + quoted(value) + "; known are " + joined(known));
  }
}

void check_finite(char const* name, Floats const& values) {
  if (!values) {
    return;
  }
  for (size_t i = 0; i < values->size(); ++i) {
    auto const value = (*values)[i];
    if (!std::isfinite(value)) {
      throw invalid(attribute(name) + " has " + (std::isnan(value) ? "NaN" : "infinity") + " at position " +
                    std::to_string(i));
    }
  }
}

void check_number(char const* name, float value, float low = -std::numeric_limits<float>::infinity()) {
  if (!std::isfinite(value)) {
    throw invalid(attribute(name) + " must be a finite number, got " + (std::isnan(value) ? "NaN" : "infinity"));
  }
  if (value < low) {
    throw invalid(attribute(name) + " must be at least " + number_text(low) + ", got " + number_text(value));
  }
}

RouterName const& find_router(std::string const& variant) {
  std::vector<std::string> names;
  for (auto const& router : kRouters) {
    if (variant == router.name) {
      return router;
    }
    names.emplace_back(router.name);
  }
  throw invalid(attribute("moe_variant") + " is " + quoted(variant) + "; known are " + joined(names));
}

// What a sub-layer is does not depend on its sizes: any will do.
std::unique_ptr<MoESubLayer> sample(std::string const& sublayer_type, bool bias) {
  SubLayerShape shape;
  shape.d_model = 64;
  shape.hidden_size = 64;
  shape.bias = bias;
  return make_sub_layer(sublayer_type, shape);
}

void check_sub_layer(LayerConfig const& config) {
  if (sample(config.sublayer_type, false)->tensors().empty()) {
    check_range("hidden_size", config.hidden_size, 0, kMaxHiddenSize);
    return;
  }
  check_range("hidden_size", config.hidden_size, 1, kMaxHiddenSize);
  if (config.weight_file.empty()) {
    throw invalid(attribute("expert_weight_file") + " is missing; sub-layer " + quoted(config.sublayer_type) +
                  " has weights");
  }
}

// Attributes that other routers would ignore; there they must be left at their defaults.
void check_unread(LayerConfig const& config, RouterName const& router) {
  LayerConfig const defaults;
  auto const refuse = [&](char const* name, std::vector<Router> const& readers) {
    if (std::find(readers.begin(), readers.end(), router.router) != readers.end()) {
      return;
    }
    std::string names;
    for (auto const& known : kRouters) {
      if (std::find(readers.begin(), readers.end(), known.router) != readers.end()) {
        names += (names.empty() ? "" : " or ") + quoted(known.name);
      }
    }
    throw invalid(attribute(name) + " is only for router " + names + ", but 'moe_variant' is " + quoted(router.name));
  };
  if (config.layernorm_weight) {
    refuse("layernorm_weight", {Router::kCpm2});
  }
  if (config.router_bias) {
    refuse("router_bias", {Router::kSigmoidTopK});
  }
  if (config.n_group != defaults.n_group) {
    refuse("n_group", {Router::kSigmoidTopK});
  }
  if (config.topk_group != defaults.topk_group) {
    refuse("topk_group", {Router::kSigmoidTopK});
  }
  if (config.routed_scaling_factor != defaults.routed_scaling_factor) {
    refuse("routed_scaling_factor",
           {Router::kSoftmaxTopK, Router::kTopKSoftmax, Router::kSigmoidTopK, Router::kSparseMixer});
  }
  if (config.router_jitter != defaults.router_jitter) {
    refuse("router_jitter", {Router::kSparseMixer});
  }
}

void check_groups(LayerConfig const& config) {
  auto const text = [](int32_t number) { return std::to_string(number); };
  check_range("n_group", config.n_group, 1);
  check_range("topk_group", config.topk_group, 0);
  if (config.expert_count % config.n_group != 0) {
    throw invalid(attribute("n_group") + " is " + text(config.n_group) + ", which does not divide the " +
                  text(config.expert_count) + " experts");
  }
  int32_t const size = config.expert_count / config.n_group;
  if (config.n_group > 1 && size < 2) {
    throw invalid(attribute("n_group") + " is " + text(config.n_group) +
                  ", but a group needs at least 2 experts and there are only " + text(config.expert_count) +
                  " experts");
  }
  if (config.topk_group > config.n_group) {
    throw invalid(attribute("topk_group") + " is " + text(config.topk_group) + ", but 'n_group' is " +
                  text(config.n_group));
  }
  int32_t const chosen = config.chosen_groups();
  if (config.top_k > chosen * size) {
    throw invalid(attribute("top_k") + " is " + text(config.top_k) + ", but " + text(chosen) + " of " +
                  text(config.n_group) + " groups hold only " + text(chosen * size) + " experts");
  }
}

void check_router(LayerConfig const& config, RouterName const& router) {
  if (config.top_k > router.most_experts) {
    throw invalid("MoELayer: router " + quoted(router.name) + " takes " +
                  (router.most_experts == 1 ? "one expert a token"
                                            : "at most " + std::to_string(router.most_experts) + " experts a token") +
                  ", but attribute 'top_k' is " + std::to_string(config.top_k));
  }
  if (router.router == Router::kCpm2 && !config.layernorm_weight) {
    throw invalid(attribute("layernorm_weight") + " is missing; router 'cpm_2' needs it");
  }
  check_unread(config, router);
  check_groups(config);
  if (config.router_bias && config.router_bias->size() != static_cast<size_t>(config.expert_count)) {
    throw invalid(attribute("router_bias") + " must have expert_count = " + std::to_string(config.expert_count) +
                  " values, got " + std::to_string(config.router_bias->size()));
  }
}

void check_sub_layer_attributes(LayerConfig const& config) {
  auto const plain = sample(config.sublayer_type, false);
  if (config.expert_bias && sample(config.sublayer_type, true)->tensors().size() == plain->tensors().size()) {
    throw invalid(attribute("expert_bias") + " is 1, but sub-layer " + quoted(config.sublayer_type) + " has no biases");
  }
  if (plain->reads_activation_parameters()) {
    return;
  }
  LayerConfig const defaults;
  auto const refuse = [&](char const* name, float value, float default_value) {
    if (value != default_value) {
      throw invalid(attribute(name) + " is not for sub-layer " + quoted(config.sublayer_type) +
                    ", which does not read it");
    }
  };
  refuse("activation_alpha", config.activation_alpha, defaults.activation_alpha);
  refuse("activation_beta", config.activation_beta, defaults.activation_beta);
  refuse("swiglu_limit", config.swiglu_limit, defaults.swiglu_limit);
}

void check_numbers(LayerConfig const& config) {
  check_finite("expert_centroids", config.centroids);
  check_finite("layernorm_weight", config.layernorm_weight);
  check_finite("router_bias", config.router_bias);
  check_number("routed_scaling_factor", config.routed_scaling_factor);
  check_number("router_jitter", config.router_jitter, 0.0F);
  check_number("activation_alpha", config.activation_alpha);
  check_number("activation_beta", config.activation_beta);
  check_number("swiglu_limit", config.swiglu_limit, 0.0F);
}

LayerConfig check(Attributes const& attributes) {
  LayerConfig config = attributes.config;
  check_range("expert_count", config.expert_count, 1, kMaxExperts);
  check_range("max_concurrency", config.max_concurrency, 1);
  check_range("top_k", config.top_k, 1);
  if (config.top_k > config.expert_count) {
    throw invalid(attribute("top_k") + " is " + std::to_string(config.top_k) + ", but there are only " +
                  std::to_string(config.expert_count) + " experts");
  }
  check_one_of("expert_sublayer_type", config.sublayer_type, sub_layer_names());
  auto const& router = find_router(attributes.variant);
  check_sub_layer(config);
  check_range("embedding_size", config.embedding_size, 0);
  check_range("normalize_routing_weights", attributes.normalize, 0, 1);
  check_range("expert_bias", attributes.expert_bias, 0, 1);
  config.expert_bias = attributes.expert_bias == 1;
  check_router(config, router);
  check_sub_layer_attributes(config);
  if (config.centroids && config.centroids->size() % static_cast<size_t>(config.expert_count) != 0) {
    throw invalid(attribute("expert_centroids") + " has " + std::to_string(config.centroids->size()) +
                  " values, which is no multiple of the " + std::to_string(config.expert_count) + " experts");
  }
  check_numbers(config);
  config.router = router.router;
  config.normalize_routing_weights = attributes.normalize == 1;
  return config;
}

void check_centroids(LayerConfig const& config, int64_t d_model) {
  if (!config.centroids) {
    throw invalid("MoELayer: without input 1 (router_logits) attribute 'expert_centroids' is needed");
  }
  // By division: a d_model that is not to be trusted must not overflow the product.
  auto const experts = static_cast<size_t>(config.expert_count);
  auto const found = config.centroids->size();
  if (found % experts != 0 || static_cast<uint64_t>(d_model) != found / experts) {
    auto const product = static_cast<unsigned __int128>(d_model) * experts;
    auto const expected = product > std::numeric_limits<uint64_t>::max()
                              ? std::string("too many")
                              : std::to_string(static_cast<uint64_t>(product));
    throw invalid(attribute("expert_centroids") + " must have d_model * expert_count = " + std::to_string(d_model) +
                  " * " + std::to_string(experts) + " = " + expected + " values, got " + std::to_string(found));
  }
}

void check_no_centroids(LayerConfig const& config) {
  if (config.centroids) {
    throw invalid(
        "MoELayer: both input 1 (router_logits) and attribute 'expert_centroids' are given; give one of them");
  }
  if (config.router == Router::kCpm2) {
    throw invalid(
        "MoELayer: router 'cpm_2' computes its own scores; remove input 1 (router_logits) and give attribute "
        "'expert_centroids'");
  }
}

}  // namespace

LayerConfig LayerConfig::from_attributes(moe_infer_attribute const* attributes, int32_t count) {
  if (count < 0 || (attributes == nullptr && count > 0)) {
    throw invalid("MoELayer: there are " + std::to_string(count) + " attributes, but no array of them");
  }
  Attributes values;
  std::array<bool, kFields.size()> seen{};
  for (int32_t i = 0; i < count; ++i) {
    std::string const name = attributes[i].name == nullptr ? "" : attributes[i].name;
    auto const field =
        std::find_if(kFields.begin(), kFields.end(), [&](Field const& known) { return name == known.name; });
    if (field == kFields.end()) {
      throw invalid("MoELayer: unknown attribute " + quoted(name) + "; known are " + known_attributes());
    }
    auto& was_seen = seen[static_cast<size_t>(field - kFields.begin())];
    if (was_seen) {
      throw invalid(attribute(name) + " is given twice");
    }
    was_seen = true;
    read_attribute(attributes[i], *field, &values);
  }
  for (size_t i = 0; i < kFields.size(); ++i) {
    if (kFields[i].required && !seen[i]) {
      throw invalid(attribute(kFields[i].name) + " is missing");
    }
  }
  return check(values);
}

void LayerConfig::check_inputs(LayerInputs const& inputs) const {
  if (inputs.d_model < 1) {
    throw invalid("MoELayer: the last dimension of hidden_states must be at least 1, got " +
                  std::to_string(inputs.d_model));
  }
  if (embedding_size != 0 && embedding_size != inputs.d_model) {
    throw invalid(attribute("embedding_size") + " is " + std::to_string(embedding_size) +
                  ", but the last dimension of hidden_states is " + std::to_string(inputs.d_model));
  }
  if (inputs.has_logits) {
    check_no_centroids(*this);
  } else {
    check_centroids(*this, inputs.d_model);
  }
  if (layernorm_weight && layernorm_weight->size() != static_cast<uint64_t>(inputs.d_model)) {
    throw invalid(attribute("layernorm_weight") + " must have d_model = " + std::to_string(inputs.d_model) +
                  " values, got " + std::to_string(layernorm_weight->size()));
  }
  if (inputs.has_logits && inputs.logits_dtype != DataType::kFloat32 && inputs.logits_dtype != inputs.dtype) {
    throw invalid(std::string("MoELayer: input 1 (router_logits) must be float32 or of hidden_states' type ") +
                  name_of(inputs.dtype) + ", got " + name_of(inputs.logits_dtype));
  }
}

}  // namespace moe_infer
