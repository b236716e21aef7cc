// T5_FF: x + down(gelu_tanh(gate(n)) * up(n)), n = layer_norm * x / sqrt(mean(x^2) + 1e-6). InfMoE's expert, which is
// T5 v1.1's feed-forward layer with its norm and its residual.
#include "core/slices.h"
#include "sublayers/feed_forward.h"
#include "sublayers/row_kernels.h"
#include "sublayers/sub_layer.h"

namespace moe_infer {
namespace {

class T5FeedForward final : public MoESubLayer {
 public:
  explicit T5FeedForward(SubLayerShape const& shape) : MoESubLayer(shape) {
    FeedForward::check(shape);
    layout_ = SlotLayout(T5FeedForward::tensors(), shape.dtype);
    feed_forward_.shape = shape;
    feed_forward_.activation = Activation::gate(ActivationKind::kGeluTanh);
    feed_forward_.offsets.first = layout_.offsets[1];
    feed_forward_.offsets.down = layout_.offsets[2];
    feed_forward_.offsets.norm = layout_.offsets[0];
  }

  std::vector<ExpertTensor> tensors() const override {
    return {{"layer_norm", {"layer_norm_weight"}, 1, shape_.d_model, true},
            {"gate_up", {"wi_0_weight", "wi_1_weight"}, 2 * shape_.hidden_size, shape_.d_model},
            {"down", {"wo_weight"}, shape_.d_model, shape_.hidden_size, false, true}};
  }

  // The normalised rows, then what the feed-forward needs.
  size_t workspace_bytes(int64_t rows, int32_t groups) const override {
    return normed_bytes(rows) + feed_forward_.workspace_bytes(rows, groups);
  }

  void run(SubLayerCall const& call) const override {
    if (call.rows == 0 || call.groups.count == 0) return;
    if (feed_forward_.runs_as_token(call)) return feed_forward_.run_token_expert(call);
    auto* const normed = static_cast<uint8_t*>(call.workspace);
    rms_norm_rows(call, shape_.dtype, shape_.d_model, layout_.offsets[0], normed);
    feed_forward_.run(call, normed, call.input, normed + normed_bytes(call.rows));
  }

  bool has_lanes() const override { return true; }
  bool has_run_token() const override { return feed_forward_.has_run_token(); }
  void run_token(ExpertGroups const& groups, TokenChoices const& token, void* workspace, bool overlap,
                 cudaStream_t stream) const override {
    feed_forward_.run_token(groups, token, workspace, overlap, stream);
  }

 private:
  size_t normed_bytes(int64_t rows) const {
    return aligned_size(static_cast<size_t>(rows) * static_cast<size_t>(shape_.d_model) * size_of(shape_.dtype));
  }

  FeedForward feed_forward_;
};

}  // namespace

MOE_REGISTER_SUBLAYER("T5_FF", T5FeedForward)

}  // namespace moe_infer
