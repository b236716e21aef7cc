// The gated feed-forward that sub-layers share: down(act(gate(x)) * up(x)), with `gate_up` (2 * hidden_size, d_model)
// whose gate and up rows alternate, and `down` (d_model, hidden_size).
#pragma once

#include <cstdint>

#include "gemm/grouped_gemm.h"
#include "sublayers/sub_layer.h"

namespace moe_infer {

struct GatedFeedForward {
  SubLayerShape shape;
  uint64_t gate_up_offset = 0;  // in a slot
  uint64_t down_offset = 0;
  Activation activation = Activation::gate(ActivationKind::kSilu);

  // Throws Error(MOE_INFER_INVALID) when the sizes are beyond what the kernels count in 32 bits.
  static void check(SubLayerShape const& shape);

  size_t workspace_bytes(int64_t rows, int32_t groups) const;
  // call.output = feed-forward of `input` (rows, d_model) + residual (rows, d_model; nullptr: none). `workspace`:
  // workspace_bytes(call.rows, call.groups.count), 256-byte aligned.
  void run(SubLayerCall const& call, void const* input, void const* residual, uint8_t* workspace) const;
};

// Bytes rounded up so that what follows is aligned as slots and workspaces are.
constexpr size_t aligned_size(size_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace moe_infer
