// Gated_SiLU: down(silu(gate(x)) * up(x)), as in Mixtral, Qwen-MoE, DeepSeek and OLMoE.
#include "sublayers/gated_feed_forward.h"

namespace moe_infer {
namespace {

class GatedSilu : public GatedFeedForward {
 public:
  explicit GatedSilu(SubLayerShape const& shape)
      : GatedFeedForward(shape, Activation::kSilu, "", "gate_weight", "up_weight", "down_weight") {}
};

MOE_REGISTER_SUBLAYER("Gated_SiLU", GatedSilu)

}  // namespace
}  // namespace moe_infer
