// TensorRT's plugin fields <-> the operator's attributes, with owned copies of both.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "core/layer_config.h"
#include "moe_infer.h"

namespace moe_infer {

// One field in serialised form: its bytes, whatever its kind.
struct FieldValue {
  std::string name;
  moe_infer_attribute_kind kind = MOE_INFER_INT32;
  std::vector<int32_t> ints;
  std::vector<float> floats;
  std::string text;
};

// Names and kinds of the operator's attributes; data is null, as IPluginCreatorV3One::getFieldNames gives it.
nvinfer1::PluginFieldCollection const& attribute_fields();

// What TensorRT was asked for when an engine was built.
struct AskedWorkspace {
  int64_t tokens = 0;  // most of a run
  size_t bytes = 0;
};

class PluginFields {
 public:
  // Copies and converts. TensorRT hands strings over with the final NUL counted, without it, or as kUNKNOWN, ints as
  // INT32 or INT64, floats as FLOAT32 or FLOAT64. `with_inputs`: the fields that are remembered below are known too.
  // Throws Error(MOE_INFER_INVALID).
  PluginFields(nvinfer1::PluginFieldCollection const* fields, bool with_inputs);

  // Parses and checks.
  LayerConfig config() const;

  void set_digest(std::string const& digest);
  // An engine does not tell a plugin what it is applied to before the first run, nor ever how large its workspace is;
  // so the engine carries both.
  void remember_inputs(LayerInputs const& inputs);
  void remember_workspace(AskedWorkspace const& workspace);
  std::optional<LayerInputs> inputs() const;
  std::optional<AskedWorkspace> workspace() const;

  // Everything, to be written into an engine. The pointers live as long as `fields` and this object stay unchanged.
  void serialize(std::vector<nvinfer1::PluginField>* fields) const;

 private:
  FieldValue const* find(char const* name) const;
  FieldValue& set(char const* name, moe_infer_attribute_kind kind);

  std::deque<FieldValue> values_;
};

}  // namespace moe_infer
