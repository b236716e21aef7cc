// down(act(gate(x)) * up(x)), the feed-forward that today's experts share; T5_FF and Gated_SiLU are built on it.
#pragma once

#include "sublayers/sub_layer.h"

namespace moe_infer {

enum class Activation { kSilu, kGeluTanh };

class GatedFeedForward : public MoESubLayer {
 public:
  // `norm_part` is the name of an RMS norm's weight in the file: then x is normalised before, and added after. Empty:
  // neither. `gate_part`, `up_part` and `down_part` are the names where a file holds the experts one by one.
  GatedFeedForward(SubLayerShape const& shape, Activation activation, std::string norm_part, std::string gate_part,
                   std::string up_part, std::string down_part);

  std::vector<ExpertTensor> tensors() const override;
  size_t workspace_bytes(int64_t rows, int32_t groups) const override;
  void run(SubLayerCall const& call) const override;

 private:
  struct Workspace;
  Workspace slice(int64_t rows, int32_t groups, uint8_t* base, size_t* bytes) const;

  Activation activation_;
  std::string norm_part_, gate_part_, up_part_, down_part_;
};

}  // namespace moe_infer
