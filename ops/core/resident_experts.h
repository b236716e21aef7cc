// Experts that stay on a device are there once, however many sessions and execution contexts use them.
#pragma once

#include <memory>

#include "core/expert_cache.h"
#include "core/expert_store.h"
#include "core/layer_config.h"

namespace moe_infer {

// All experts of the layer, loaded, on `device`, which is current. Shared by every caller with the same file, prefix,
// sub-layer, type and device, as long as one of them holds it.
std::shared_ptr<ExpertCache> resident_experts(std::shared_ptr<ExpertStore> store, LayerConfig const& config,
                                              DataType dtype, int device);

}  // namespace moe_infer
