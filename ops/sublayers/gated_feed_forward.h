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
  bool has_norm = false;  // T5's, before; the caller of run does it, run_token does it itself
  uint64_t norm_offset = 0;

  // Throws Error(MOE_INFER_INVALID) when the sizes are beyond what the kernels count in 32 bits.
  static void check(SubLayerShape const& shape);

  size_t workspace_bytes(int64_t rows, int32_t groups) const;
  // call.output = feed-forward of `input` (rows, d_model) + residual (rows, d_model; nullptr: none). `workspace`:
  // workspace_bytes(call.rows, call.groups.count), 256-byte aligned.
  void run(SubLayerCall const& call, void const* input, void const* residual, uint8_t* workspace) const;
  // The same for a single token (token_feed_forward.h), norm and residual included.
  bool has_run_token() const;
  void run_token(ExpertGroups const& groups, TokenChoices const& token, void* workspace, bool overlap,
                 cudaStream_t stream) const;
  bool runs_as_token(SubLayerCall const& call) const { return call.single_token && has_run_token(); }
  void run_token_expert(SubLayerCall const& call) const;
};

// Bytes rounded up so that what follows is aligned as slots and workspaces are.
constexpr size_t aligned_size(size_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace moe_infer
