// Which slot a fetched expert takes.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace moe_infer {

struct SlotState {
  int32_t expert = -1;   // -1: empty
  int64_t last_use = 0;  // number that grows with every use
  bool needed = false;   // this call still has to run the expert in it
};

class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;
  // Index of the slot to fill. An empty one if there is one; one that is still needed only if all are.
  virtual int32_t choose(std::vector<SlotState> const& slots) const = 0;
};

// Least recently used.
std::unique_ptr<EvictionPolicy> make_lru_policy();

}  // namespace moe_infer
