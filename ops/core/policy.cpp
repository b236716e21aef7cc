#include "core/policy.h"

#include <algorithm>
#include <tuple>

namespace moe_infer {
namespace {

class LruPolicy final : public EvictionPolicy {
 public:
  int32_t choose(std::vector<SlotState> const& slots) const override {
    auto const key = [](SlotState const& slot) {
      return std::make_tuple(slot.expert >= 0, slot.needed, slot.last_use);
    };
    auto const victim = std::min_element(slots.begin(), slots.end(),
                                         [&](SlotState const& a, SlotState const& b) { return key(a) < key(b); });
    return static_cast<int32_t>(victim - slots.begin());
  }
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_lru_policy() { return std::make_unique<LruPolicy>(); }

}  // namespace moe_infer
