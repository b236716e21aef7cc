// Plain feed-forwards, down(act(up(x))): Switch and other models of the T5 and BERT kind.
#include "sublayers/feed_forward_sub_layer.h"

namespace moe_infer {
namespace {

template <ActivationKind kKind>
struct Plain final : FeedForwardSubLayer {
  explicit Plain(SubLayerShape const& shape) : FeedForwardSubLayer(shape, Activation::plain(kKind)) {}
};

using SiluFeedForward = Plain<ActivationKind::kSilu>;
using ReluFeedForward = Plain<ActivationKind::kRelu>;
using GeluFeedForward = Plain<ActivationKind::kGelu>;
using GeluTanhFeedForward = Plain<ActivationKind::kGeluTanh>;

}  // namespace

MOE_REGISTER_SUBLAYER("SiLU_FF", SiluFeedForward)
MOE_REGISTER_SUBLAYER("ReLU_FF", ReluFeedForward)
MOE_REGISTER_SUBLAYER("GELU_FF", GeluFeedForward)
MOE_REGISTER_SUBLAYER("GELU_Tanh_FF", GeluTanhFeedForward)

}  // namespace moe_infer
