// Makes plugins from attributes (build) or from what an engine holds (run time).
#pragma once

#include <NvInferRuntime.h>

namespace moe_infer {

class MoELayerCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit MoELayerCreator(char const* name) : name_(name) {}

  // Opens the weight file's index and loads nothing: ONNX Runtime makes plugins only to ask what they support.
  // Null after an error, which is in TensorRT's log and in moe_infer_last_error.
  nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const* name, nvinfer1::PluginFieldCollection const* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override;
  nvinfer1::AsciiChar const* getPluginName() const noexcept override { return name_; }
  nvinfer1::AsciiChar const* getPluginVersion() const noexcept override;
  nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return ""; }

 private:
  char const* name_;
};

}  // namespace moe_infer
