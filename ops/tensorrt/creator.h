// Makes plugins for TensorRT, under the name of the ONNX operator and under the name for direct use.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

namespace moe_infer {

class Creator : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit Creator(char const* name);

  nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const* name, nvinfer1::PluginFieldCollection const* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
  nvinfer1::AsciiChar const* getPluginName() const noexcept override { return name_.c_str(); }
  nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return "1"; }
  nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return ""; }

 private:
  std::string name_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

// "MoELayer" and "MoELayerPlugin"; they live as long as the library.
std::vector<nvinfer1::IPluginCreatorInterface*> creators();

}  // namespace moe_infer
