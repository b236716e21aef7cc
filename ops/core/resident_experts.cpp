#include "core/resident_experts.h"

#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>

namespace moe_infer {
namespace {

using Key = std::tuple<std::string, std::string, std::string, std::string, int32_t, int32_t, DataType, int>;

struct Registry {
  std::mutex mutex;
  std::map<Key, std::weak_ptr<ExpertCache>> caches;
};

Registry& registry() {
  static auto* const instance = new Registry();  // never destroyed: layers may outlive what is destroyed at exit
  return *instance;
}

}  // namespace

std::shared_ptr<ExpertCache> resident_experts(std::shared_ptr<ExpertStore> store, LayerConfig const& config,
                                              DataType dtype, int device) {
  Key const key{store->path(),
                store->digest(),
                config.weight_prefix,
                config.sublayer_type,
                config.expert_count,
                config.hidden_size,
                dtype,
                device};
  auto& known = registry();
  // Held while loading: a second session on the same model waits for the first and then shares with it.
  std::lock_guard<std::mutex> const lock(known.mutex);
  for (auto entry = known.caches.begin(); entry != known.caches.end();) {
    entry = entry->second.expired() ? known.caches.erase(entry) : std::next(entry);
  }
  auto cache = known.caches[key].lock();
  // A file with the same index may have been put in the place of the one whose experts are there.
  if (cache == nullptr || !cache->unchanged()) {
    store->load(/*pin=*/false);  // each byte is copied once: pinning would take longer
    SlotLayout layout(store->tensors(), dtype);
    cache = std::make_shared<ExpertCache>(std::move(store), config.expert_count, config.expert_count, std::move(layout),
                                          dtype);
    cache->load_all();
    known.caches[key] = cache;
  }
  return cache;
}

}  // namespace moe_infer
