// A feed-forward for a single token: its experts read straight from the token, and their results straight into the
// output. There is nothing to sort and hardly anything to compute; the time is that of reading the chosen experts, so
// weights go from memory into registers, and every multiprocessor reads from the first microsecond on.
//
// Two kernels. The first computes act(gate) * up (or act(up)) of every chosen expert into `inner`, the second `down`,
// and weighs and adds the experts. When experts stream they come one at a time, and the second kernel gives the
// expert's own output instead. Both round an expert's output to the layer's type, so the bits are the same.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/data_type.h"
#include "gemm/activation.cuh"
#include "sublayers/sub_layer.h"

namespace moe_infer {

// Offsets are in a slot.
struct TokenFeedForward {
  static constexpr int32_t kMostChoices = kMostPlannedChoices;  // of a token
  SubLayerShape shape;
  Activation activation;
  uint64_t first_offset = 0;  // gate_up (2 * hidden_size, d_model), gate and up rows alternating; or up
  uint64_t down_offset = 0;   // (d_model, hidden_size)
  bool has_bias = false;
  uint64_t first_bias_offset = 0;
  uint64_t down_bias_offset = 0;
  bool has_norm = false;  // T5: RMS norm before, and the token itself is added after
  uint64_t norm_offset = 0;

  // True when rows can be read 16 bytes at a time and the token fits into shared memory.
  static bool can_run(SubLayerShape const& shape);
  // Of `inner` for this many experts.
  size_t inner_bytes(int64_t experts) const;
  // All experts of the token: output (d_model) = the weighted sum. Slots from `groups`; its rows are not looked at.
  void run(ExpertGroups const& groups, TokenChoices const& token, void* inner, bool overlap, cudaStream_t stream) const;
  // The one expert of `call`, if the token chose it: call.output row = its result.
  void run_expert(SubLayerCall const& call, void* inner) const;
};

}  // namespace moe_infer
