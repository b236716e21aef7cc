#include "tensorrt/attributes.h"

#include <limits>

#include "core/error.h"

namespace moe_infer {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

struct Known {
  char const* name;
  PluginFieldType type;
};

constexpr Known kKnown[] = {
    {"expert_count", PluginFieldType::kINT32},        {"hidden_size", PluginFieldType::kINT32},
    {"expert_sublayer_type", PluginFieldType::kCHAR}, {"expert_weight_file", PluginFieldType::kCHAR},
    {"expert_weight_prefix", PluginFieldType::kCHAR}, {"expert_weight_digest", PluginFieldType::kCHAR},
    {"max_concurrency", PluginFieldType::kINT32},     {"top_k", PluginFieldType::kINT32},
    {"moe_variant", PluginFieldType::kCHAR},          {"normalize_routing_weights", PluginFieldType::kINT32},
    {"expert_centroids", PluginFieldType::kFLOAT32},  {"layernorm_weight", PluginFieldType::kFLOAT32},
    {"embedding_size", PluginFieldType::kINT32},
};

bool is_text(std::string const& name) {
  for (Known const& known : kKnown) {
    if (name == known.name) return known.type == PluginFieldType::kCHAR;
  }
  return false;
}

}  // namespace

std::vector<PluginField> attribute_fields() {
  std::vector<PluginField> fields;
  for (Known const& known : kKnown) fields.emplace_back(known.name, nullptr, known.type, 1);
  return fields;
}

Attributes::Attributes(nvinfer1::PluginFieldCollection const& fields) {
  for (int32_t i = 0; i < fields.nbFields; ++i) {
    PluginField const& field = fields.fields[i];
    // The ONNX parser hands over fields without data for attributes that the node does not have.
    if (field.name == nullptr || field.data == nullptr) continue;
    values_[field.name] = read(field);
  }
}

Attributes::Value Attributes::read(PluginField const& field) {
  Value value;
  if (field.length < 0) {
    throw invalid(std::string("MoELayer: attribute '") + field.name + "' has length " + std::to_string(field.length));
  }
  auto const count = static_cast<size_t>(field.length);
  if (field.type == PluginFieldType::kCHAR || (field.type == PluginFieldType::kUNKNOWN && is_text(field.name))) {
    value.kind = MOE_INFER_STRING;
    value.text.assign(static_cast<char const*>(field.data), count);
    value.text.resize(value.text.find('\0') == std::string::npos ? count : value.text.find('\0'));
    return value;
  }
  switch (field.type) {
    case PluginFieldType::kINT32: {
      auto const* data = static_cast<int32_t const*>(field.data);
      value.ints.assign(data, data + count);
      return value;
    }
    case PluginFieldType::kINT64:
      for (size_t i = 0; i < count; ++i) {
        int64_t const wide = static_cast<int64_t const*>(field.data)[i];
        if (wide < std::numeric_limits<int32_t>::min() || wide > std::numeric_limits<int32_t>::max()) {
          throw invalid(std::string("MoELayer: attribute '") + field.name + "' is " + std::to_string(wide) +
                        ", which does not fit 32 bits");
        }
        value.ints.push_back(static_cast<int32_t>(wide));
      }
      return value;
    case PluginFieldType::kFLOAT32: {
      auto const* data = static_cast<float const*>(field.data);
      value.kind = MOE_INFER_FLOATS;
      value.floats.assign(data, data + count);
      return value;
    }
    case PluginFieldType::kFLOAT64:
      value.kind = MOE_INFER_FLOATS;
      for (size_t i = 0; i < count; ++i) {
        value.floats.push_back(static_cast<float>(static_cast<double const*>(field.data)[i]));
      }
      return value;
    default:
      throw invalid(std::string("MoELayer: attribute '") + field.name + "' has plugin field type " +
                    std::to_string(static_cast<int32_t>(field.type)) + "; expected an int, floats or a string");
  }
}

LayerConfig Attributes::config() const {
  std::vector<moe_infer_attribute> attributes;
  for (auto const& [name, value] : values_) {
    moe_infer_attribute attribute{name.c_str(), value.kind, 0, nullptr};
    switch (value.kind) {
      case MOE_INFER_INT32:
        attribute.count = static_cast<int64_t>(value.ints.size());
        attribute.data = value.ints.data();
        break;
      case MOE_INFER_FLOATS:
        attribute.count = static_cast<int64_t>(value.floats.size());
        attribute.data = value.floats.data();
        break;
      case MOE_INFER_STRING:
        attribute.count = static_cast<int64_t>(value.text.size());
        attribute.data = value.text.data();
        break;
    }
    attributes.push_back(attribute);
  }
  return LayerConfig::from_attributes(attributes.data(), static_cast<int32_t>(attributes.size()));
}

void Attributes::set_string(char const* name, std::string const& value) {
  values_[name] = Value{MOE_INFER_STRING, {}, {}, value};
}

void Attributes::set_int(char const* name, int32_t value) { values_[name] = Value{MOE_INFER_INT32, {value}, {}, {}}; }

int32_t Attributes::take_int(char const* name, int32_t otherwise) {
  auto const found = values_.find(name);
  if (found == values_.end()) return otherwise;
  int32_t const value = found->second.ints.empty() ? otherwise : found->second.ints.front();
  values_.erase(found);
  return value;
}

std::vector<PluginField> Attributes::fields() const {
  std::vector<PluginField> fields;
  for (auto const& [name, value] : values_) {
    switch (value.kind) {
      case MOE_INFER_INT32:
        fields.emplace_back(name.c_str(), value.ints.data(), PluginFieldType::kINT32,
                            static_cast<int32_t>(value.ints.size()));
        break;
      case MOE_INFER_FLOATS:
        fields.emplace_back(name.c_str(), value.floats.data(), PluginFieldType::kFLOAT32,
                            static_cast<int32_t>(value.floats.size()));
        break;
      case MOE_INFER_STRING:  // with its NUL, as the ONNX parser hands strings over
        fields.emplace_back(name.c_str(), value.text.c_str(), PluginFieldType::kCHAR,
                            static_cast<int32_t>(value.text.size() + 1));
        break;
    }
  }
  return fields;
}

}  // namespace moe_infer
