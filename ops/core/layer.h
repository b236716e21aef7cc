// One MoE layer on one CUDA device: route, group, run the experts, combine. Knows nothing of TensorRT.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "core/device_memory.h"
#include "core/expert_cache.h"
#include "core/expert_store.h"
#include "core/layer_config.h"
#include "core/live_layers.h"
#include "core/run_lanes.h"
#include "fetch/device_fetch.h"
#include "route/route.h"
#include "sublayers/sub_layer.h"

namespace moe_infer {

// Device arrays of one run.
struct Workspace {
  Routing routing;
  void* grouped = nullptr;        // (choices, d_model): hidden states in the order of the experts
  void* expert_output = nullptr;  // (choices, d_model)
  void* sub_layer = nullptr;
};

// What follows from attributes and inputs alone: needs no file and no GPU memory.
class LayerPlan {
 public:
  // Throws Error(MOE_INFER_INVALID).
  LayerPlan(LayerConfig const& config, LayerInputs const& inputs);

  // The one place that sizes and slices the workspace: with base == nullptr only the size is computed. Grows with
  // `tokens`. Throws Error(MOE_INFER_INVALID) for more tokens than 32-bit row numbers reach.
  size_t layout(int64_t tokens, uint8_t* base, Workspace* workspace) const;

  LayerConfig const& config() const { return config_; }
  LayerInputs const& inputs() const { return inputs_; }
  MoESubLayer const& sub_layer() const { return *sub_layer_; }
  bool has_weights() const { return has_weights_; }
  // True when experts are brought in during a run.
  bool streams() const { return has_weights_ && !config_.resident(); }

 private:
  LayerConfig config_;
  LayerInputs inputs_;
  std::unique_ptr<MoESubLayer> sub_layer_;
  bool has_weights_;
};

class MoELayer {
 public:
  // Checks everything, allocates the slots on the current device; loads all experts when they all fit.
  MoELayer(LayerConfig config, LayerInputs const& inputs);
  ~MoELayer();
  MoELayer(MoELayer const&) = delete;
  MoELayer& operator=(MoELayer const&) = delete;

  // The same function slices the workspace in run.
  size_t workspace_bytes(int64_t tokens) const;

  // Resident, or kernels fetch: enqueues only, so it can be captured in a CUDA graph. When the host copies it waits
  // once for the choice of the experts, hence refuses to be captured. The device must be the one on which the layer was
  // made. Several threads may run it, each on its own workspace and stream; while it streams they take turns. Replays
  // of a graph that streams are ordered by the caller, with each other and with other runs of the layer. `next` changes
  // no result; it is of use with a single token, whose experts the host copies.
  void run(void const* hidden_states, void const* router_logits, NextLogits const& next, void* output, int64_t tokens,
           void* workspace, size_t workspace_bytes, cudaStream_t stream);

  LayerPlan const& plan() const { return plan_; }
  // What the layer did so far. Any thread, also while others run it; may wait for the device, which a run never does to
  // count: so not while a CUDA graph is captured on the device, which CUDA would give up. A resident layer's choices
  // stay on the device: it counts runs and tokens, and not the uses of its experts.
  LayerStatistics statistics() const;
  // What a user should know about how the experts reach the device, as a sentence for a log; "" if nothing.
  std::string note() const;

 private:
  // Who brings the experts of a run.
  enum class Experts {
    kResident,
    kPlannedAndCopied,  // kernels plan and copy (DeviceFetch)
    kPlanned,           // a kernel plans, the host enqueues the copies (DeviceFetch)
    kFromHost,          // the host plans and runs one expert after the other (ExpertCache)
  };

  void make_cache();
  // `ahead`: what the next layer needs is guessed, which only the host fetches.
  Experts who_brings(int64_t tokens, bool captures, bool ahead) const;
  Copier who_copies(int64_t tokens, bool captures, bool ahead) const;  // what a kernel planned
  static std::optional<Copier> copier_of(Experts experts);             // none: no kernel plans
  void check_run(void const* hidden_states, void const* router_logits, NextLogits const& next, void* output,
                 void const* workspace) const;
  void run_experts(Experts experts, void const* hidden_states, void const* router_logits, NextLogits const& next,
                   void* output, int64_t tokens, Workspace const& workspace, cudaStream_t stream);
  // The scores, computed if they are not given; of many tokens, too.
  TokenRouter score(void const* hidden_states, void const* router_logits, int64_t tokens, Workspace const& workspace,
                    cudaStream_t stream) const;
  void group(void const* hidden_states, int64_t tokens, Workspace const& workspace, bool overlap,
             cudaStream_t stream) const;
  bool runs_single_token(int64_t tokens) const;
  // Not for Experts::kFromHost.
  void run_token(Experts experts, TokenRouter const& router, void const* hidden_states, NextLogits const& next,
                 void* output, Workspace const& workspace, cudaStream_t stream) const;
  void run_streaming(void const* hidden_states, void const* router_logits, NextLogits const& next, void* output,
                     int64_t tokens, Workspace const& workspace, cudaStream_t stream);
  void run_from_host(int64_t rows, Workspace const& workspace, cudaStream_t stream);
  ExpertGroups all_groups(Experts experts, Workspace const& workspace) const;
  SubLayerCall call(int64_t rows, Workspace const& workspace, ExpertGroups const& groups, bool overlap,
                    cudaStream_t stream) const;

  LayerPlan plan_;
  int device_;
  RouterWeights router_weights_;
  RouterParams router_params_;
  DeviceMemory centroids_, layernorm_weight_;
  std::shared_ptr<DeviceMemory const> router_bias_;  // null: none
  std::shared_ptr<ExpertCache> cache_;  // null for a sub-layer without weights; shared when all experts stay
  std::mutex streaming_;                // guards what follows, and the cache while it streams
  PinnedMemory counts_;
  std::unique_ptr<RunLanes> lanes_;                // of runs whose experts the host brings
  std::unique_ptr<Event> counts_read_, streamed_;  // streamed_: the last run that used the slots
  FetchMode fetch_mode_ = FetchMode::kAuto;
  std::unique_ptr<DeviceFetch> device_fetch_;  // null: the host fetches, one expert after the other
  std::string why_not_device_;                 // why no CUDA graph can capture the layer
  std::atomic<int64_t> runs_{0}, tokens_{0};
  LiveLayer live_;  // last: who is listed is whole
};

}  // namespace moe_infer
