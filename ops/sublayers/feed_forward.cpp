#include "sublayers/feed_forward.h"

#include <limits>
#include <string>

#include "core/error.h"
#include "core/slices.h"
#include "sublayers/token_feed_forward.h"

namespace moe_infer {
namespace {

void set_bias(GroupedGemm* gemm, std::optional<uint64_t> const& offset) {
  gemm->has_bias = offset.has_value();
  gemm->bias_offset = offset.value_or(0);
}

TokenFeedForward for_token(FeedForward const& layer) {
  auto const& offsets = layer.offsets;
  TokenFeedForward token;
  token.shape = layer.shape;
  token.activation = layer.activation;
  token.first_offset = offsets.first;
  token.down_offset = offsets.down;
  token.has_bias = offsets.first_bias.has_value();
  token.first_bias_offset = offsets.first_bias.value_or(0);
  token.down_bias_offset = offsets.down_bias.value_or(0);
  token.has_norm = offsets.norm.has_value();
  token.norm_offset = offsets.norm.value_or(0);
  return token;
}

}  // namespace

void FeedForward::check(SubLayerShape const& shape) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (2 * shape.hidden_size > kMost || shape.d_model > kMost) {
    throw invalid("MoELayer: attribute 'hidden_size' must be at most " + std::to_string(kMost / 2) +
                  " and d_model at most " + std::to_string(kMost) + " for a feed-forward, got " +
                  std::to_string(shape.hidden_size) + " and " + std::to_string(shape.d_model));
  }
}

size_t FeedForward::inner_bytes(int64_t rows) const {
  return aligned_size(static_cast<size_t>(rows) * static_cast<size_t>(shape.hidden_size) * size_of(shape.dtype));
}

size_t FeedForward::workspace_bytes(int64_t rows, int32_t groups) const {
  return inner_bytes(rows) + kMostLanes * aligned_size(grouped_gemm_workspace(groups));
}

void FeedForward::run(SubLayerCall const& call, void const* input, void const* residual, uint8_t* workspace) const {
  GroupedGemm gemm;
  gemm.dtype = shape.dtype;
  gemm.groups = call.groups;
  gemm.rows = call.rows;
  gemm.expert_count = call.expert_count;
  gemm.counters = call.counters;
  gemm.overlap = call.overlap;
  gemm.after_fetch = call.groups.arrivals.there != nullptr && input == call.input;  // else another kernel comes first
  gemm.stream = call.stream;
  auto const lane = static_cast<size_t>(call.lane);
  gemm.workspace = workspace + inner_bytes(call.rows) + lane * aligned_size(grouped_gemm_workspace(call.groups.count));

  gemm.n = activation.gated ? 2 * shape.hidden_size : shape.hidden_size;
  gemm.k = shape.d_model;
  gemm.weight_offset = offsets.first;
  set_bias(&gemm, offsets.first_bias);
  gemm.input = input;
  gemm.input_stride = shape.d_model;
  gemm.output = workspace;
  gemm.activation = activation;
  grouped_gemm(gemm);

  if (call.counters != nullptr) gemm.counters = call.counters + 2;
  gemm.after_fetch = false;
  gemm.n = shape.d_model;
  gemm.k = shape.hidden_size;
  gemm.weight_offset = offsets.down;
  set_bias(&gemm, offsets.down_bias);
  gemm.input = workspace;
  gemm.input_stride = shape.hidden_size;
  gemm.source = residual;
  gemm.output = call.output;
  gemm.activation = Activation::none();
  grouped_gemm(gemm);
}

bool FeedForward::has_run_token() const { return TokenFeedForward::can_run(shape); }

void FeedForward::run_token(ExpertGroups const& groups, TokenChoices const& token, void* workspace, bool overlap,
                            cudaStream_t stream) const {
  for_token(*this).run(groups, token, workspace, overlap, stream);
}

void FeedForward::run_token_expert(SubLayerCall const& call) const {
  for_token(*this).run_expert(call, call.workspace);
}

}  // namespace moe_infer
