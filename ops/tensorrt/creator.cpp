#include "tensorrt/creator.h"

#include "tensorrt/log.h"
#include "tensorrt/moe_layer_plugin.h"
#include "tensorrt/plugin_fields.h"
#include "tensorrt/tensor_desc.h"

namespace moe_infer {

nvinfer1::IPluginV3* MoELayerCreator::createPlugin(nvinfer1::AsciiChar const*,
                                                   nvinfer1::PluginFieldCollection const* fields,
                                                   nvinfer1::TensorRTPhase phase) noexcept {
  nvinfer1::IPluginV3* plugin = nullptr;
  guarded_by_log([&] {
    bool const from_engine = phase == nvinfer1::TensorRTPhase::kRUNTIME;
    plugin = new MoELayerPlugin(name_, PluginFields(fields, from_engine), phase);
  });
  return plugin;
}

nvinfer1::PluginFieldCollection const* MoELayerCreator::getFieldNames() noexcept {
  nvinfer1::PluginFieldCollection const* fields = nullptr;
  guarded_by_log([&] { fields = &attribute_fields(); });
  return fields;
}

nvinfer1::AsciiChar const* MoELayerCreator::getPluginVersion() const noexcept { return kPluginVersion; }

}  // namespace moe_infer
