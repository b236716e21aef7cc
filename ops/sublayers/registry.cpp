// The sub-layers by name. Each registers itself when the library is loaded (MOE_REGISTER_SUBLAYER).
#include <map>

#include "core/error.h"
#include "sublayers/sub_layer.h"

namespace moe_infer {
namespace {

// Inside a function, so that it exists before the first registration, whatever the order of the files.
std::map<std::string, SubLayerFactory>& factories() {
  static std::map<std::string, SubLayerFactory> registered;
  return registered;
}

}  // namespace

SubLayerRegistration::SubLayerRegistration(char const* name, SubLayerFactory factory) { factories()[name] = factory; }

std::vector<std::string> sub_layer_names() {
  std::vector<std::string> names;
  for (auto const& [name, factory] : factories()) names.push_back(name);
  return names;
}

std::unique_ptr<MoESubLayer> make_sub_layer(std::string const& name, SubLayerShape const& shape) {
  auto const found = factories().find(name);
  if (found == factories().end()) {
    std::string known;
    for (std::string const& other : sub_layer_names()) known += (known.empty() ? "" : ", ") + other;
    throw invalid("MoELayer: attribute 'expert_sublayer_type' is '" + name + "'; known are " + known);
  }
  return found->second(shape);
}

}  // namespace moe_infer
