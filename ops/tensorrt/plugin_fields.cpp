#include "tensorrt/plugin_fields.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "core/error.h"

namespace moe_infer {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr char const* kInputs = "network_inputs";        // d_model, dtype, has_logits, logits_dtype
constexpr char const* kWorkspace = "network_workspace";  // most tokens, units of kWorkspaceUnit bytes
constexpr size_t kWorkspaceUnit = 256;                   // so that any size fits 32 bits
constexpr char const* kDigest = "expert_weight_digest";

// Values of a field that is no attribute but remembered in an engine; 0: it is none.
int32_t remembered_length(std::string const& name) { return name == kInputs ? 4 : name == kWorkspace ? 2 : 0; }

// tests/test_tensorrt_registry.py compares these with the operator's definition in moe_infer/op.
constexpr struct {
  char const* name;
  moe_infer_attribute_kind kind;
} kAttributes[] = {
    {"expert_count", MOE_INFER_INT32},
    {"hidden_size", MOE_INFER_INT32},
    {"expert_sublayer_type", MOE_INFER_STRING},
    {"expert_weight_file", MOE_INFER_STRING},
    {"expert_weight_prefix", MOE_INFER_STRING},
    {kDigest, MOE_INFER_STRING},
    {"max_concurrency", MOE_INFER_INT32},
    {"top_k", MOE_INFER_INT32},
    {"moe_variant", MOE_INFER_STRING},
    {"normalize_routing_weights", MOE_INFER_INT32},
    {"router_bias", MOE_INFER_FLOATS},
    {"n_group", MOE_INFER_INT32},
    {"topk_group", MOE_INFER_INT32},
    {"routed_scaling_factor", MOE_INFER_FLOAT},
    {"router_jitter", MOE_INFER_FLOAT},
    {"expert_centroids", MOE_INFER_FLOATS},
    {"layernorm_weight", MOE_INFER_FLOATS},
    {"expert_bias", MOE_INFER_INT32},
    {"activation_alpha", MOE_INFER_FLOAT},
    {"activation_beta", MOE_INFER_FLOAT},
    {"swiglu_limit", MOE_INFER_FLOAT},
    {"embedding_size", MOE_INFER_INT32},
};

PluginFieldType field_type(moe_infer_attribute_kind kind) {
  switch (kind) {
    case MOE_INFER_INT32:
      return PluginFieldType::kINT32;
    case MOE_INFER_FLOATS:
    case MOE_INFER_FLOAT:
      return PluginFieldType::kFLOAT32;
    case MOE_INFER_STRING:
      break;
  }
  return PluginFieldType::kCHAR;
}

std::string type_name(PluginFieldType type) {
  switch (type) {
    case PluginFieldType::kFLOAT16:
      return "FLOAT16";
    case PluginFieldType::kFLOAT32:
      return "FLOAT32";
    case PluginFieldType::kFLOAT64:
      return "FLOAT64";
    case PluginFieldType::kINT8:
      return "INT8";
    case PluginFieldType::kINT16:
      return "INT16";
    case PluginFieldType::kINT32:
      return "INT32";
    case PluginFieldType::kINT64:
      return "INT64";
    case PluginFieldType::kCHAR:
      return "CHAR";
    case PluginFieldType::kUNKNOWN:
      return "UNKNOWN";
    default:
      return "number " + std::to_string(static_cast<int32_t>(type));
  }
}

Error wrong_field(PluginField const& field, std::string const& expected) {
  return invalid(std::string("MoELayer: attribute '") + field.name + "' must be " + expected + ", got " +
                 std::to_string(field.length) + " of type " + type_name(field.type));
}

// Element i of an array that need not be aligned.
template <class T>
T element(PluginField const& field, int32_t i) {
  T value;
  std::memcpy(&value, static_cast<char const*>(field.data) + static_cast<size_t>(i) * sizeof(T), sizeof(T));
  return value;
}

int32_t read_int(PluginField const& field, int32_t i) {
  if (field.type == PluginFieldType::kINT32) {
    return element<int32_t>(field, i);
  }
  auto const value = element<int64_t>(field, i);
  if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max()) {
    throw invalid(std::string("MoELayer: attribute '") + field.name + "' must fit 32 bits, got " +
                  std::to_string(value));
  }
  return static_cast<int32_t>(value);
}

void read_ints(PluginField const& field, int32_t length, FieldValue* value) {
  bool const is_int = field.type == PluginFieldType::kINT32 || field.type == PluginFieldType::kINT64;
  if (!is_int || field.length != length) {
    throw wrong_field(field, std::to_string(length) + " of type INT32 or INT64");
  }
  for (int32_t i = 0; i < length; ++i) {
    value->ints.push_back(read_int(field, i));
  }
}

void read_floats(PluginField const& field, FieldValue* value) {
  bool const wide = field.type == PluginFieldType::kFLOAT64;
  bool const one = value->kind == MOE_INFER_FLOAT;
  if ((!wide && field.type != PluginFieldType::kFLOAT32) || (one && field.length != 1)) {
    throw wrong_field(field, std::string(one ? "1" : "values") + " of type FLOAT32 or FLOAT64");
  }
  value->floats.reserve(static_cast<size_t>(field.length));
  for (int32_t i = 0; i < field.length; ++i) {
    value->floats.push_back(wide ? static_cast<float>(element<double>(field, i)) : element<float>(field, i));
  }
}

void read_text(PluginField const& field, FieldValue* value) {
  bool const is_text = field.type == PluginFieldType::kCHAR || field.type == PluginFieldType::kUNKNOWN ||
                       field.type == PluginFieldType::kINT8;
  if (!is_text) {
    throw wrong_field(field, "a string (CHAR)");
  }
  value->text.assign(static_cast<char const*>(field.data), static_cast<size_t>(field.length));
  value->text.resize(std::strlen(value->text.c_str()));  // without the final NUL
}

FieldValue read_field(PluginField const& field, bool with_inputs) {
  if (field.name == nullptr || field.length < 0 || (field.length > 0 && field.data == nullptr)) {
    throw invalid(std::string("MoELayer: TensorRT gave a malformed field") +
                  (field.name == nullptr ? " without a name" : std::string(" '") + field.name + "'"));
  }
  FieldValue value;
  value.name = field.name;
  int32_t const remembered = with_inputs ? remembered_length(value.name) : 0;
  if (remembered > 0) {
    read_ints(field, remembered, &value);
    return value;
  }
  auto const* const known = std::find_if(std::begin(kAttributes), std::end(kAttributes),
                                         [&](auto const& attribute) { return value.name == attribute.name; });
  // An unknown one passes as a string: LayerConfig has the sentence for it.
  value.kind = known == std::end(kAttributes) ? MOE_INFER_STRING : known->kind;
  if (known == std::end(kAttributes)) {
    return value;
  }
  if (value.kind == MOE_INFER_INT32) {
    read_ints(field, 1, &value);
  } else if (value.kind == MOE_INFER_FLOATS || value.kind == MOE_INFER_FLOAT) {
    read_floats(field, &value);
  } else {
    read_text(field, &value);
  }
  return value;
}

}  // namespace

nvinfer1::PluginFieldCollection const& attribute_fields() {
  // Never destroyed: TensorRT may ask at the end of the process.
  static auto* const fields = [] {
    auto* const list = new std::vector<PluginField>();
    for (auto const& attribute : kAttributes) {
      list->emplace_back(attribute.name, nullptr, field_type(attribute.kind), 1);
    }
    return list;
  }();
  static nvinfer1::PluginFieldCollection const collection{static_cast<int32_t>(fields->size()), fields->data()};
  return collection;
}

PluginFields::PluginFields(nvinfer1::PluginFieldCollection const* fields, bool with_inputs) {
  if (fields == nullptr || fields->nbFields < 0 || (fields->nbFields > 0 && fields->fields == nullptr)) {
    throw invalid("MoELayer: TensorRT gave no attributes");
  }
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    values_.push_back(read_field(fields->fields[i], with_inputs));
  }
}

LayerConfig PluginFields::config() const {
  std::vector<moe_infer_attribute> attributes;
  for (auto const& value : values_) {
    if (remembered_length(value.name) > 0) {
      continue;
    }
    moe_infer_attribute attribute = {value.name.c_str(), value.kind, 0, nullptr};
    if (value.kind == MOE_INFER_INT32) {
      attribute.count = static_cast<int64_t>(value.ints.size());
      attribute.data = value.ints.data();
    } else if (value.kind == MOE_INFER_FLOATS || value.kind == MOE_INFER_FLOAT) {
      attribute.count = static_cast<int64_t>(value.floats.size());
      attribute.data = value.floats.data();
    } else {
      attribute.count = static_cast<int64_t>(value.text.size());
      attribute.data = value.text.c_str();
    }
    attributes.push_back(attribute);
  }
  return LayerConfig::from_attributes(attributes.data(), static_cast<int32_t>(attributes.size()));
}

FieldValue const* PluginFields::find(char const* name) const {
  auto const found =
      std::find_if(values_.begin(), values_.end(), [&](FieldValue const& value) { return value.name == name; });
  return found == values_.end() ? nullptr : &*found;
}

FieldValue& PluginFields::set(char const* name, moe_infer_attribute_kind kind) {
  auto* value = const_cast<FieldValue*>(find(name));
  if (value == nullptr) {
    value = &values_.emplace_back();
  }
  *value = FieldValue();
  value->name = name;
  value->kind = kind;
  return *value;
}

void PluginFields::set_digest(std::string const& digest) { set(kDigest, MOE_INFER_STRING).text = digest; }

void PluginFields::remember_inputs(LayerInputs const& inputs) {
  if (inputs.d_model > std::numeric_limits<int32_t>::max()) {
    throw invalid("MoELayer: the last dimension of hidden_states must fit 32 bits, got " +
                  std::to_string(inputs.d_model));
  }
  set(kInputs, MOE_INFER_INT32).ints = {static_cast<int32_t>(inputs.d_model), static_cast<int32_t>(inputs.dtype),
                                        inputs.has_logits ? 1 : 0, static_cast<int32_t>(inputs.logits_dtype)};
}

void PluginFields::remember_workspace(AskedWorkspace const& workspace) {
  set(kWorkspace, MOE_INFER_INT32).ints = {
      static_cast<int32_t>(workspace.tokens),
      static_cast<int32_t>((workspace.bytes + kWorkspaceUnit - 1) / kWorkspaceUnit)};
}

std::optional<LayerInputs> PluginFields::inputs() const {
  auto const* const value = find(kInputs);
  if (value == nullptr) {
    return std::nullopt;
  }
  auto const& ints = value->ints;
  for (size_t const i : {size_t{1}, size_t{3}}) {
    if (ints[i] < MOE_INFER_FLOAT32 || ints[i] > MOE_INFER_BFLOAT16) {
      throw invalid("MoELayer: the engine holds the unknown type number " + std::to_string(ints[i]) +
                    "; build the engine again");
    }
  }
  LayerInputs inputs;
  inputs.d_model = ints[0];
  inputs.dtype = static_cast<DataType>(ints[1]);
  inputs.has_logits = ints[2] != 0;
  inputs.logits_dtype = static_cast<DataType>(ints[3]);
  return inputs;
}

std::optional<AskedWorkspace> PluginFields::workspace() const {
  auto const* const value = find(kWorkspace);
  if (value == nullptr) {
    return std::nullopt;
  }
  return AskedWorkspace{value->ints[0], static_cast<size_t>(value->ints[1]) * kWorkspaceUnit};
}

void PluginFields::serialize(std::vector<PluginField>* fields) const {
  fields->clear();
  for (auto const& value : values_) {
    if (value.kind == MOE_INFER_INT32) {
      fields->emplace_back(value.name.c_str(), value.ints.data(), PluginFieldType::kINT32,
                           static_cast<int32_t>(value.ints.size()));
    } else if (value.kind == MOE_INFER_FLOATS || value.kind == MOE_INFER_FLOAT) {
      fields->emplace_back(value.name.c_str(), value.floats.data(), PluginFieldType::kFLOAT32,
                           static_cast<int32_t>(value.floats.size()));
    } else {
      fields->emplace_back(value.name.c_str(), value.text.c_str(), PluginFieldType::kCHAR,
                           static_cast<int32_t>(value.text.size() + 1));
    }
  }
}

}  // namespace moe_infer
