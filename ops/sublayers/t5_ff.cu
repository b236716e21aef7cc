// T5_FF: x + wo(gelu_tanh(wi_0(n)) * wi_1(n)), n = layer_norm * x / sqrt(mean(x^2) + 1e-6), the feed-forward of T5
// v1.1.
#include "sublayers/gated_feed_forward.h"

namespace moe_infer {
namespace {

class T5FeedForward : public GatedFeedForward {
 public:
  explicit T5FeedForward(SubLayerShape const& shape)
      : GatedFeedForward(shape, Activation::kGeluTanh, "layer_norm_weight", "wi_0_weight", "wi_1_weight", "wo_weight") {
  }
};

MOE_REGISTER_SUBLAYER("T5_FF", T5FeedForward)

}  // namespace
}  // namespace moe_infer
