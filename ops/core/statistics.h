// What a layer did since it was made, as it is handed to whoever asks.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "moe_infer.h"

namespace moe_infer {

// A copy that belongs to the caller. Who keeps experts fills it in: ExpertCache for what the host drives, and whatever
// counts on the device may copy its counters back (and wait for them) now; a run never does.
struct LayerStatistics {
  int64_t id = 0;  // number of the layer in this process, never given twice
  std::string weight_file, weight_prefix, sublayer_type;
  int32_t device = 0;
  int32_t expert_count = 0;
  int32_t slots = 0;
  uint64_t slot_bytes = 0;
  bool streams = false;
  moe_infer_stats counters = {};
  std::vector<int64_t> uses;            // of each expert: runs that needed it; empty where nobody counts
  std::vector<int32_t> slot_of_expert;  // -1: in none; empty for a sub-layer without weights
};

}  // namespace moe_infer
