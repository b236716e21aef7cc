// Gated feed-forwards, down(act(gate(x)) * up(x)): the experts of most of today's models.
#include "sublayers/feed_forward_sub_layer.h"

namespace moe_infer {
namespace {

template <ActivationKind kKind>
struct Gated final : FeedForwardSubLayer {
  explicit Gated(SubLayerShape const& shape) : FeedForwardSubLayer(shape, Activation::gate(kKind)) {}
};

using GatedSilu = Gated<ActivationKind::kSilu>;
using GatedGelu = Gated<ActivationKind::kGelu>;
using GatedGeluTanh = Gated<ActivationKind::kGeluTanh>;
using GatedRelu = Gated<ActivationKind::kRelu>;

// gpt-oss: gate and up are clamped, the sigmoid has a factor, and up is moved.
struct ClampedSwiGlu final : FeedForwardSubLayer {
  explicit ClampedSwiGlu(SubLayerShape const& shape)
      : FeedForwardSubLayer(
            shape, Activation::clamped_swiglu(shape.activation_alpha, shape.activation_beta, shape.swiglu_limit)) {}
  bool reads_activation_parameters() const override { return true; }
};

}  // namespace

MOE_REGISTER_SUBLAYER("Gated_SiLU", GatedSilu)
MOE_REGISTER_SUBLAYER("Gated_GELU", GatedGelu)
MOE_REGISTER_SUBLAYER("Gated_GELU_Tanh", GatedGeluTanh)
MOE_REGISTER_SUBLAYER("Gated_ReLU", GatedRelu)
MOE_REGISTER_SUBLAYER("Clamped_SwiGLU", ClampedSwiGlu)

}  // namespace moe_infer
