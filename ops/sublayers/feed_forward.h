// The two products of a feed-forward, which sub-layers share:
//
//   gated: down(act(gate(x)) * up(x)), with `gate_up` (2 * hidden_size, d_model), whose gate and up rows alternate
//   plain: down(act(up(x))), with `up` (hidden_size, d_model)
//
// and `down` (d_model, hidden_size); each with a bias or without.
#pragma once

#include <cstdint>
#include <optional>

#include "gemm/grouped_gemm.h"
#include "sublayers/sub_layer.h"

namespace moe_infer {

// Where the tensors lie in a slot.
struct FeedForwardOffsets {
  uint64_t first = 0;  // gate_up or up
  uint64_t down = 0;
  std::optional<uint64_t> first_bias;  // both or none
  std::optional<uint64_t> down_bias;
  std::optional<uint64_t> norm;  // T5's, before: the caller of run does it, run_token does it itself
};

struct FeedForward {
  SubLayerShape shape;
  Activation activation;
  FeedForwardOffsets offsets;

  // Throws Error(MOE_INFER_INVALID) when the sizes are beyond what the kernels count in 32 bits.
  static void check(SubLayerShape const& shape);

  size_t workspace_bytes(int64_t rows, int32_t groups) const;
  // call.output = feed-forward of `input` (rows, d_model) + residual (rows, d_model; nullptr: none; only without
  // biases). `workspace`: workspace_bytes(call.rows, call.groups.count), 256-byte aligned.
  void run(SubLayerCall const& call, void const* input, void const* residual, uint8_t* workspace) const;

  // The same for a single token (token_feed_forward.h), norm and residual included.
  bool has_run_token() const;
  void run_token(ExpertGroups const& groups, TokenChoices const& token, void* workspace, bool overlap,
                 cudaStream_t stream) const;
  bool runs_as_token(SubLayerCall const& call) const { return call.single_token && has_run_token(); }
  void run_token_expert(SubLayerCall const& call) const;

 private:
  size_t inner_bytes(int64_t rows) const;
};

}  // namespace moe_infer
