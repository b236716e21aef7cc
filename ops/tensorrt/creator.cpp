#include "tensorrt/creator.h"

#include "core/error.h"
#include "tensorrt/attributes.h"
#include "tensorrt/plugin.h"
#include "tensorrt/registration.h"

namespace moe_infer {

Creator::Creator(char const* name) : name_(name), fields_(attribute_fields()) {
  collection_.nbFields = static_cast<int32_t>(fields_.size());
  collection_.fields = fields_.data();
}

nvinfer1::IPluginV3* Creator::createPlugin(nvinfer1::AsciiChar const* name,
                                           nvinfer1::PluginFieldCollection const* fields,
                                           nvinfer1::TensorRTPhase phase) noexcept {
  std::string const layer = name == nullptr || *name == '\0' ? "" : " (layer " + std::string(name) + ")";
  try {
    if (fields == nullptr) throw invalid("MoELayer: no plugin fields were given");
    return new Plugin(name_, Attributes(*fields), phase);
  } catch (std::exception const& error) {
    log_error(error.what() + layer);
  } catch (...) {
    log_error("MoELayer: unknown error" + layer);
  }
  return nullptr;
}

std::vector<nvinfer1::IPluginCreatorInterface*> creators() {
  static Creator operator_creator("MoELayer");
  static Creator plugin_creator("MoELayerPlugin");
  return {&operator_creator, &plugin_creator};
}

}  // namespace moe_infer
