// A sub-layer that is a feed-forward and nothing else; gated.cpp and plain.cpp have one for each activation.
#pragma once

#include <vector>

#include "sublayers/feed_forward.h"
#include "sublayers/sub_layer.h"

namespace moe_infer {

class FeedForwardSubLayer : public MoESubLayer {
 public:
  FeedForwardSubLayer(SubLayerShape const& shape, Activation const& activation) : MoESubLayer(shape) {
    FeedForward::check(shape);
    feed_forward_.shape = shape;
    feed_forward_.activation = activation;
    layout_ = SlotLayout(FeedForwardSubLayer::tensors(), shape.dtype);
    auto const& at = layout_.offsets;
    feed_forward_.offsets.first = at[0];
    feed_forward_.offsets.down = at[1];
    if (shape.bias) {
      feed_forward_.offsets.first_bias = at[2];
      feed_forward_.offsets.down_bias = at[3];
    }
  }

  std::vector<ExpertTensor> tensors() const override {
    bool const gated = feed_forward_.activation.gated;
    int64_t const columns = gated ? 2 * shape_.hidden_size : shape_.hidden_size;
    std::vector<ExpertTensor> found;
    if (gated) {
      found.push_back({"gate_up", {"gate_weight", "up_weight"}, columns, shape_.d_model});
    } else {
      found.push_back({"up", {"up_weight"}, columns, shape_.d_model});
    }
    found.push_back({"down", {"down_weight"}, shape_.d_model, shape_.hidden_size, false, true});
    if (!shape_.bias) return found;
    if (gated) {
      found.push_back({"gate_up_bias", {"gate_bias", "up_bias"}, columns, 1, true});
    } else {
      found.push_back({"up_bias", {"up_bias"}, columns, 1, true});
    }
    found.push_back({"down_bias", {"down_bias"}, shape_.d_model, 1, true});
    return found;
  }

  size_t workspace_bytes(int64_t rows, int32_t groups) const override {
    return feed_forward_.workspace_bytes(rows, groups);
  }

  void run(SubLayerCall const& call) const override {
    if (call.rows == 0 || call.groups.count == 0) return;
    if (feed_forward_.runs_as_token(call)) return feed_forward_.run_token_expert(call);
    feed_forward_.run(call, call.input, nullptr, static_cast<uint8_t*>(call.workspace));
  }

  bool has_lanes() const override { return true; }
  bool has_run_token() const override { return feed_forward_.has_run_token(); }
  void run_token(ExpertGroups const& groups, TokenChoices const& token, void* workspace, bool overlap,
                 cudaStream_t stream) const override {
    feed_forward_.run_token(groups, token, workspace, overlap, stream);
  }

 private:
  FeedForward feed_forward_;
};

}  // namespace moe_infer
