// Device side of the experts of one layer: `max_concurrency` slots, kept across calls.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "core/expert_store.h"
#include "moe_infer.h"

namespace moe_infer {

class ExpertCache {
 public:
  // Allocates slots and staging on the current device. Loads nothing.
  ExpertCache(std::shared_ptr<ExpertStore> store, int32_t expert_count, int32_t slots, SlotLayout layout,
              DataType dtype);
  ~ExpertCache();
  ExpertCache(ExpertCache const&) = delete;
  ExpertCache& operator=(ExpertCache const&) = delete;

  // Loads every expert into the slot of its number and waits. Only when slots >= expert_count.
  void load_all();

  // Streaming: brings the needed experts in, one after another, while `use` runs those that are there. Experts that are
  // already in a slot come first. For each, `use(expert, slot)` is called once its bytes are ordered before `stream`;
  // a slot is reused only when the work that `use` enqueued is done. `counts` (host): rows of each expert.
  template <class Use>
  void run_needed(int32_t const* counts, cudaStream_t stream, Use&& use);

  uint8_t const* slots() const;
  uint64_t slot_bytes() const;
  // Device array 0, 1, 2, ...: slot_of_group for groups of one expert point into it; resident layers use all of it.
  int32_t const* slot_numbers() const;
  void add_stats(moe_infer_stats* stats) const;
};

}  // namespace moe_infer
