#include "sublayers/gated_feed_forward.h"

#include <limits>
#include <string>

#include "core/error.h"
#include "sublayers/row_kernels.h"
#include "sublayers/token_feed_forward.h"

namespace moe_infer {
namespace {

// Columns of the intermediate rows: the activation is fused into the first product, or takes place in its float32
// output and leaves half of each row unused.
int64_t inner_columns(SubLayerShape const& shape) {
  return fuses_activation(shape.dtype) ? shape.hidden_size : 2 * shape.hidden_size;
}

size_t inner_bytes(SubLayerShape const& shape, int64_t rows) {
  return aligned_size(static_cast<size_t>(rows) * static_cast<size_t>(inner_columns(shape)) * size_of(shape.dtype));
}

TokenFeedForward for_token(GatedFeedForward const& layer) {
  TokenFeedForward token;
  token.shape = layer.shape;
  token.activation = layer.activation;
  token.first_offset = layer.gate_up_offset;
  token.down_offset = layer.down_offset;
  token.has_norm = layer.has_norm;
  token.norm_offset = layer.norm_offset;
  return token;
}

}  // namespace

void GatedFeedForward::check(SubLayerShape const& shape) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (2 * shape.hidden_size > kMost || shape.d_model > kMost) {
    throw invalid("MoELayer: attribute 'hidden_size' must be at most " + std::to_string(kMost / 2) +
                  " and d_model at most " + std::to_string(kMost) + " for a gated feed-forward, got " +
                  std::to_string(shape.hidden_size) + " and " + std::to_string(shape.d_model));
  }
}

size_t GatedFeedForward::workspace_bytes(int64_t rows, int32_t groups) const {
  return inner_bytes(shape, rows) + aligned_size(grouped_gemm_workspace(groups));
}

void GatedFeedForward::run(SubLayerCall const& call, void const* input, void const* residual,
                           uint8_t* workspace) const {
  bool const fused = fuses_activation(shape.dtype);
  GroupedGemm gemm;
  gemm.dtype = shape.dtype;
  gemm.groups = call.groups;
  gemm.rows = call.rows;
  gemm.expert_count = call.expert_count;
  gemm.counters = call.counters;
  gemm.overlap = call.overlap;
  gemm.stream = call.stream;
  gemm.workspace = workspace + inner_bytes(shape, call.rows);

  gemm.n = 2 * shape.hidden_size;
  gemm.k = shape.d_model;
  gemm.weight_offset = gate_up_offset;
  gemm.input = input;
  gemm.input_stride = shape.d_model;
  gemm.output = workspace;
  gemm.activation = fused ? activation : Activation::none();
  grouped_gemm(gemm);
  if (!fused) gate_rows_in_place(call, shape.hidden_size, activation, reinterpret_cast<float*>(workspace));

  if (call.counters != nullptr) gemm.counters = call.counters + 2;
  gemm.n = shape.d_model;
  gemm.k = shape.hidden_size;
  gemm.weight_offset = down_offset;
  gemm.input = workspace;
  gemm.input_stride = inner_columns(shape);
  gemm.source = residual;
  gemm.output = call.output;
  gemm.activation = Activation::none();
  grouped_gemm(gemm);
}

bool GatedFeedForward::has_run_token() const { return TokenFeedForward::can_run(shape); }

void GatedFeedForward::run_token(ExpertGroups const& groups, TokenChoices const& token, void* workspace, bool overlap,
                                 cudaStream_t stream) const {
  for_token(*this).run(groups, token, workspace, overlap, stream);
}

void GatedFeedForward::run_token_expert(SubLayerCall const& call) const {
  for_token(*this).run_expert(call, call.workspace);
}

}  // namespace moe_infer
