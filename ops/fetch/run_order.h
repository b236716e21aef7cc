// Which layer runs after which. Nobody says so: it is learned from the order in which a thread runs them, which is that
// of the graph, over and over. When it is wrong once, a guess is.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>

#include "core/device_memory.h"
#include "route/route.h"

namespace moe_infer {

// What another layer needs to guess for this one. What it points to lives as long as it does, and so outlives the layer
// while kernels of another may read it.
struct GuessTarget {
  int64_t id = 0;  // of ExpertBus
  int device = 0;
  RouterParams router;
  int32_t const* slot_of_expert = nullptr;  // device (experts)
  std::shared_ptr<DeviceMemory const> router_bias, tables;
};

// The layer that ran next, as far as is known.
class NextLayer {
 public:
  std::shared_ptr<GuessTarget const> get() const;
  void set(std::shared_ptr<GuessTarget const> const& target);

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<GuessTarget const> target_;
};

// At the begin of each run of any layer. `own`: for the layer that this thread ran before; null: nobody may guess for
// this one. `next`: where the following run is to be noted; null: nobody wants to know.
void note_run(std::shared_ptr<GuessTarget const> const& own, std::shared_ptr<NextLayer> const& next);

}  // namespace moe_infer
