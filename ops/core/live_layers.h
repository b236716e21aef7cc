// The layers that are alive in this process, whoever made them: the C entry or TensorRT's plugins inside of sessions.
#pragma once

#include <cstdint>
#include <vector>

#include "core/statistics.h"

namespace moe_infer {

class MoELayer;

// A layer's place among the live ones; it leaves when this is destroyed. The last member of the layer, so that a layer
// that is listed is whole.
class LiveLayer {
 public:
  LiveLayer() = default;
  ~LiveLayer();
  LiveLayer(LiveLayer const&) = delete;
  LiveLayer& operator=(LiveLayer const&) = delete;

  void enter(MoELayer const& layer);
  int64_t id() const { return id_; }  // 0 before enter

 private:
  int64_t id_ = 0;
};

// The statistics of all layers, in the order in which they were made. Layers are made and destroyed by one thread at a
// time with this; runs go on meanwhile. Throws what a layer's statistics() throws.
std::vector<LayerStatistics> statistics_of_live_layers();

}  // namespace moe_infer
