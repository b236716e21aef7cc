// The way of a token to its experts and back, all on the device: score, select, group, gather ... combine.
// Routing is in float32 whatever the input type. Ties go to the lower expert index. A token whose scores hold NaN keeps
// inside all buffers and gets NaN as output.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/data_type.h"
#include "core/layer_config.h"

namespace moe_infer {

// Device arrays of one call. `choices` = tokens * top_k; choice c is expert c % top_k of token c / top_k.
// `rows` are the choices sorted by expert (stable), so that an expert's rows are contiguous.
struct Routing {
  float* scores = nullptr;  // (tokens, experts); unused when router_logits is given
  int32_t* expert_of_choice = nullptr;
  float* weight_of_choice = nullptr;
  int32_t* row_of_choice = nullptr;
  int32_t* row_begin = nullptr;  // (experts + 1): expert e has rows row_begin[e] .. row_begin[e + 1]
  int32_t* counts = nullptr;     // (experts)
  int32_t* counters = nullptr;   // kCountersOfRun zeros for the sub-layer
  void* group_scratch = nullptr;

  // The one place that sizes and slices this workspace: with base == nullptr only the size is computed.
  static size_t layout(int64_t tokens, int32_t top_k, int32_t experts, bool has_logits, uint8_t* base,
                       Routing* routing);
};

struct RouterWeights {                      // device, float32
  float const* centroids = nullptr;         // (d_model, experts)
  float const* layernorm_weight = nullptr;  // (d_model), cpm_2
};

// A layer's router. Handed to kernels by value.
struct RouterParams {
  Router router = Router::kDefault;
  bool normalize = false;  // divide the chosen weights by their sum
  int32_t experts = 1;
  int32_t top_k = 1;
  int32_t n_group = 1;
  int32_t topk_group = 1;  // as many as n_group: no limit
  float scaling_factor = 1.0F;
  float jitter = 0.01F;                // sparse_mixer
  float const* router_bias = nullptr;  // (experts) on the device, sigmoid_topk; nullptr: none
};

// A router and what it chooses by, on the device: the scores (experts) of a token, or of several one after the other.
struct TokenRouter {
  RouterParams params;
  void const* scores = nullptr;
  DataType dtype = DataType::kFloat32;
};

// scores = hidden_states @ centroids, after RMS normalisation for cpm_2.
void compute_scores(void const* hidden_states, DataType dtype, RouterWeights const& weights, Router router,
                    int64_t tokens, int64_t d_model, int32_t experts, float* scores, cudaStream_t stream);
// Chooses top_k experts a token and their weights (select_token.cuh).
// `overlap`, here and below: start while the previous kernel still runs (core/launch.h).
void select_experts(TokenRouter const& router, int64_t tokens, Routing const& routing, bool overlap,
                    cudaStream_t stream);
// Sorts the choices by expert and finds each expert's rows.
void group_by_expert(int64_t tokens, int32_t experts, int32_t top_k, Routing const& routing, bool overlap,
                     cudaStream_t stream);
// grouped[row_of_choice[c]] = hidden_states[c / top_k].
void gather_rows(void const* hidden_states, DataType dtype, int64_t tokens, int64_t d_model, int32_t top_k,
                 Routing const& routing, void* grouped, bool overlap, cudaStream_t stream);
// output[t] = sum over k of weight * expert_output[row_of_choice[t * top_k + k]] (float32 sum in the order of k);
// base_layer adds (1 - weight) * hidden_states[t].
void combine(void const* expert_output, void const* hidden_states, DataType dtype, Router router, int64_t tokens,
             int64_t d_model, int32_t top_k, Routing const& routing, void* output, bool overlap, cudaStream_t stream);

}  // namespace moe_infer
