// The tensors of two sub-layers without their kernels, so that the host side can be built by g++ alone.
#include "sublayers/sub_layer.h"

namespace moe_infer {
namespace {

class WithoutKernels : public MoESubLayer {
 public:
  using MoESubLayer::MoESubLayer;
  size_t workspace_bytes(int64_t, int32_t) const override { return 0; }
  void run(SubLayerCall const&) const override {}
};

class T5FeedForward : public WithoutKernels {
 public:
  using WithoutKernels::WithoutKernels;
  std::vector<ExpertTensor> tensors() const override {
    return {{"layer_norm", {"layer_norm_weight"}, 1, shape_.d_model, true},
            {"gate_up", {"wi_0_weight", "wi_1_weight"}, 2 * shape_.hidden_size, shape_.d_model, false},
            {"down", {"wo_weight"}, shape_.d_model, shape_.hidden_size, false}};
  }
};

class Identity : public WithoutKernels {
 public:
  using WithoutKernels::WithoutKernels;
  std::vector<ExpertTensor> tensors() const override { return {}; }
};

MOE_REGISTER_SUBLAYER("Identity", Identity)
MOE_REGISTER_SUBLAYER("T5_FF", T5FeedForward)

}  // namespace
}  // namespace moe_infer
