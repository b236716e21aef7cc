// The node's attributes as TensorRT hands them over (plugin fields), kept so that they can be given back when an engine
// is serialised.
#pragma once

#include <NvInferRuntime.h>

#include <map>
#include <string>
#include <vector>

#include "core/layer_config.h"

namespace moe_infer {

// Names and types of all attributes, for IPluginCreator::getFieldNames.
std::vector<nvinfer1::PluginField> attribute_fields();

class Attributes {
 public:
  Attributes() = default;
  // Copies the fields. From Python strings come without their NUL, or with an unknown type. Throws
  // Error(MOE_INFER_INVALID) that names the field.
  explicit Attributes(nvinfer1::PluginFieldCollection const& fields);

  LayerConfig config() const;
  void set_string(char const* name, std::string const& value);
  void set_int(char const* name, int32_t value);
  // The value of an int field, or `otherwise` when there is none. Removes it.
  int32_t take_int(char const* name, int32_t otherwise);
  // Fields whose data live in this object.
  std::vector<nvinfer1::PluginField> fields() const;

 private:
  struct Value {
    moe_infer_attribute_kind kind = MOE_INFER_INT32;
    std::vector<int32_t> ints;
    std::vector<float> floats;
    std::string text;
  };
  static Value read(nvinfer1::PluginField const& field);

  std::map<std::string, Value> values_;
};

}  // namespace moe_infer
