#include "core/live_layers.h"

#include <map>
#include <mutex>

#include "core/layer.h"

namespace moe_infer {
namespace {

struct Registry {
  std::mutex mutex;
  std::map<int64_t, MoELayer const*> layers;
  int64_t last_id = 0;
};

Registry& registry() {
  static auto* const instance = new Registry();  // never destroyed: layers may outlive what is destroyed at exit
  return *instance;
}

}  // namespace

LiveLayer::~LiveLayer() {
  if (id_ != 0) {
    auto& known = registry();
    std::lock_guard<std::mutex> const lock(known.mutex);
    known.layers.erase(id_);
  }
}

void LiveLayer::enter(MoELayer const& layer) {
  auto& known = registry();
  std::lock_guard<std::mutex> const lock(known.mutex);
  int64_t const id = known.last_id + 1;
  known.layers.emplace(id, &layer);
  known.last_id = id;
  id_ = id;
}

std::vector<LayerStatistics> statistics_of_live_layers() {
  auto& known = registry();
  std::lock_guard<std::mutex> const lock(known.mutex);  // no layer goes while it is asked
  std::vector<LayerStatistics> found;
  found.reserve(known.layers.size());
  for (auto const& entry : known.layers) {
    found.push_back(entry.second->statistics());
  }
  return found;
}

}  // namespace moe_infer
