// Gated_SiLU: down(silu(gate(x)) * up(x)), the expert of Mixtral, Qwen, DeepSeek and OLMoE.
#include "sublayers/gated_feed_forward.h"
#include "sublayers/sub_layer.h"

namespace moe_infer {
namespace {

class GatedSilu final : public MoESubLayer {
 public:
  explicit GatedSilu(SubLayerShape const& shape) : MoESubLayer(shape) {
    GatedFeedForward::check(shape);
    layout_ = SlotLayout(GatedSilu::tensors(), shape.dtype);
    feed_forward_ = {shape, layout_.offsets[0], layout_.offsets[1], Activation::gate(ActivationKind::kSilu), false, 0};
  }

  std::vector<ExpertTensor> tensors() const override {
    return {{"gate_up", {"gate_weight", "up_weight"}, 2 * shape_.hidden_size, shape_.d_model},
            {"down", {"down_weight"}, shape_.d_model, shape_.hidden_size}};
  }

  size_t workspace_bytes(int64_t rows, int32_t groups) const override {
    return feed_forward_.workspace_bytes(rows, groups);
  }

  void run(SubLayerCall const& call) const override {
    if (call.rows == 0 || call.groups.count == 0) return;
    if (feed_forward_.runs_as_token(call)) return feed_forward_.run_token_expert(call);
    feed_forward_.run(call, call.input, nullptr, static_cast<uint8_t*>(call.workspace));
  }

  bool has_run_token() const override { return feed_forward_.has_run_token(); }
  void run_token(ExpertGroups const& groups, TokenChoices const& token, void* workspace, bool overlap,
                 cudaStream_t stream) const override {
    feed_forward_.run_token(groups, token, workspace, overlap, stream);
  }

 private:
  GatedFeedForward feed_forward_;
};

}  // namespace

MOE_REGISTER_SUBLAYER("Gated_SiLU", GatedSilu)

}  // namespace moe_infer
