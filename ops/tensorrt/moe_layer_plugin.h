// TensorRT's view of one MoE layer: shapes, types, serialisation, and the calls into MoELayer.
#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <string>
#include <vector>

#include "core/layer.h"
#include "core/layer_config.h"
#include "tensorrt/plugin_fields.h"

namespace moe_infer {

// One class for the three capabilities, as they share the attributes. Objects that TensorRT holds for building or as
// prototypes hold no weights; only the one that attachToContext makes for a run-time context owns a MoELayer.
class MoELayerPlugin final : public nvinfer1::IPluginV3,
                             public nvinfer1::IPluginV3OneCore,
                             public nvinfer1::IPluginV3OneBuild,
                             public nvinfer1::IPluginV3OneRuntime {
 public:
  // Checks the attributes and the weight file's index. Throws Error; from an engine only for bad attributes, a file
  // that does not fit is then the error of every run. `creator_name` is a literal.
  MoELayerPlugin(char const* creator_name, PluginFields fields, nvinfer1::TensorRTPhase phase);
  ~MoELayerPlugin() override = default;

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  // IPluginV3OneCore
  nvinfer1::AsciiChar const* getPluginName() const noexcept override { return creator_name_; }
  nvinfer1::AsciiChar const* getPluginVersion() const noexcept override;
  nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return ""; }

  // IPluginV3OneBuild
  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t output_count,
                             nvinfer1::DataType const* input_types, int32_t input_count) const noexcept override;
  int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t input_count,
                          nvinfer1::DimsExprs const* shape_inputs, int32_t shape_input_count,
                          nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* tensors,
                                 int32_t input_count, int32_t output_count) noexcept override;
  int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t input_count,
                          nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t output_count) noexcept override;
  size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t input_count,
                          nvinfer1::DynamicPluginTensorDesc const* outputs,
                          int32_t output_count) const noexcept override;

  // IPluginV3OneRuntime
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  int32_t onShapeChange(nvinfer1::PluginTensorDesc const* inputs, int32_t input_count,
                        nvinfer1::PluginTensorDesc const* outputs, int32_t output_count) noexcept override;
  int32_t enqueue(nvinfer1::PluginTensorDesc const* input_desc, nvinfer1::PluginTensorDesc const* output_desc,
                  void const* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

 private:
  MoELayerPlugin(MoELayerPlugin const& other);  // without the layer
  void check_workspace() const;                 // throws Error(MOE_INFER_INVALID)
  void make_layer(LayerInputs const& inputs);
  // Remembers the sentence of what just failed (status not 0), or that nothing did.
  void keep_failure(int32_t status) noexcept;
  void run(nvinfer1::PluginTensorDesc const* input_desc, void const* const* inputs, void* const* outputs,
           void* workspace, cudaStream_t stream);

  char const* creator_name_;
  nvinfer1::TensorRTPhase phase_;
  PluginFields fields_;
  LayerConfig config_;
  std::unique_ptr<MoELayer> layer_;
  bool has_next_logits_ = false;  // as onShapeChange saw last
  std::string failure_;           // why there is no layer
  std::vector<nvinfer1::PluginField> serialized_;
  nvinfer1::PluginFieldCollection serialized_collection_{};
};

}  // namespace moe_infer
