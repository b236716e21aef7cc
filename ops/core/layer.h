// One MoE layer on one CUDA device: route, group, run the experts, combine. Knows nothing of TensorRT.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "core/expert_cache.h"
#include "core/expert_store.h"
#include "core/layer_config.h"
#include "route/route.h"

namespace moe_infer {

class MoELayer {
 public:
  // Checks everything, allocates the slots on the current device; loads all experts when they all fit.
  MoELayer(LayerConfig config, LayerInputs const& inputs);
  ~MoELayer();

  // The same function slices the workspace in run.
  size_t workspace_bytes(int64_t tokens) const;

  // Resident: enqueues only, so it can be captured in a CUDA graph. Streaming (max_concurrency < expert_count): reads
  // the counts back once, hence refuses to be captured.
  void run(void const* hidden_states, void const* router_logits, void* output, int64_t tokens, void* workspace,
           size_t workspace_bytes, cudaStream_t stream);

  moe_infer_stats stats() const;
};

}  // namespace moe_infer
