#include "core/layer.h"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "core/cuda_check.h"
#include "core/device_limits.h"
#include "core/resident_experts.h"
#include "core/slices.h"
#include "core/sub_layer_shape.h"
#include "sublayers/token_feed_forward.h"

namespace moe_infer {
namespace {

constexpr size_t kTensorAlignment = 16;
// With more tokens in a run the host enqueues the copies where it may: the copy engine is faster than a kernel that
// reads host memory, and the time in which the host waits for the plan no longer matters.
constexpr int64_t kMostTokensForKernels = 64;

RouterParams params_of(LayerConfig const& config, float const* router_bias) {
  RouterParams params;
  params.router = config.router;
  params.normalize = config.normalize_routing_weights;
  params.experts = config.expert_count;
  params.top_k = config.top_k;
  params.n_group = config.n_group;
  params.topk_group = config.chosen_groups();
  params.scaling_factor = config.routed_scaling_factor;
  params.jitter = config.router_jitter;
  params.router_bias = router_bias;
  return params;
}

LayerConfig const& checked(LayerConfig const& config, LayerInputs const& inputs) {
  config.check_inputs(inputs);
  return config;
}

DeviceMemory upload(std::vector<float> const& values, char const* what) {
  size_t const bytes = sizeof(float) * values.size();
  auto memory = allocate_device(bytes, what, "free some GPU memory");
  MOE_CUDA_CHECK(cudaMemcpy(memory.bytes(), values.data(), bytes, cudaMemcpyHostToDevice));
  // It may be on its way still, and runs are on streams that do not wait for it.
  cudaStream_t const default_stream = nullptr;
  MOE_CUDA_CHECK(cudaStreamSynchronize(default_stream));
  return memory;
}

void check_aligned(char const* name, void const* pointer, size_t alignment) {
  if (pointer == nullptr || reinterpret_cast<uintptr_t>(pointer) % alignment != 0) {
    throw invalid(std::string("MoELayer: ") + name + " must be a device address that is a multiple of " +
                  std::to_string(alignment) + ", got " + std::to_string(reinterpret_cast<uintptr_t>(pointer)));
  }
}

}  // namespace

LayerPlan::LayerPlan(LayerConfig const& config, LayerInputs const& inputs)
    : config_(checked(config, inputs)),
      inputs_(inputs),
      sub_layer_(make_sub_layer(config.sublayer_type, sub_layer_shape(config, inputs.d_model, inputs.dtype))),
      has_weights_(!sub_layer_->tensors().empty()) {}

size_t LayerPlan::layout(int64_t tokens, uint8_t* base, Workspace* workspace) const {
  int64_t const most_tokens = std::numeric_limits<int32_t>::max() / config_.top_k;
  if (tokens < 0 || tokens > most_tokens) {
    throw invalid("MoELayer: hidden_states must have 0 to " + std::to_string(most_tokens) +
                  " tokens at top_k = " + std::to_string(config_.top_k) + ", got " + std::to_string(tokens));
  }
  int64_t const rows = tokens * config_.top_k;
  size_t const row_bytes = static_cast<size_t>(inputs_.d_model) * size_of(inputs_.dtype);
  Workspace parts;
  Slices slices(base);
  // The first slice, hence at base itself.
  slices.take<uint8_t>(
      Routing::layout(tokens, config_.top_k, config_.expert_count, inputs_.has_logits, base, &parts.routing));
  parts.grouped = slices.take<uint8_t>(static_cast<size_t>(rows) * row_bytes);
  parts.expert_output = slices.take<uint8_t>(static_cast<size_t>(rows) * row_bytes);
  parts.sub_layer = slices.take<uint8_t>(sub_layer_->workspace_bytes(rows, config_.expert_count));
  if (workspace != nullptr) {
    *workspace = parts;
  }
  return slices.bytes();
}

MoELayer::MoELayer(LayerConfig config, LayerInputs const& inputs) : plan_(config, inputs), device_(current_device()) {
  if (config.centroids) {
    centroids_ = upload(*config.centroids, "expert_centroids");
    router_weights_.centroids = centroids_.as<float>();
  }
  if (config.layernorm_weight) {
    layernorm_weight_ = upload(*config.layernorm_weight, "layernorm_weight");
    router_weights_.layernorm_weight = layernorm_weight_.as<float>();
  }
  if (config.router_bias) {
    router_bias_ = std::make_shared<DeviceMemory const>(upload(*config.router_bias, "router_bias"));
  }
  router_params_ = params_of(config, router_bias_ == nullptr ? nullptr : router_bias_->as<float>());
  if (plan_.has_weights()) {
    make_cache();
  }
  live_.enter(*this);
}

void MoELayer::make_cache() {
  auto const& config = plan_.config();
  auto const& inputs = plan_.inputs();
  auto store = ExpertStore::open(config, inputs.d_model);
  if (!plan_.streams()) {
    cache_ = resident_experts(std::move(store), config, inputs.dtype, device_);
    return;
  }
  store->load();
  SlotLayout layout(store->tensors(), inputs.dtype);
  cache_ = std::make_shared<ExpertCache>(std::move(store), config.expert_count, config.max_concurrency,
                                         std::move(layout), inputs.dtype);
  cache_->remember(config.weight_prefix);
  counts_ = allocate_pinned(sizeof(int32_t) * static_cast<size_t>(config.expert_count));
  counts_read_ = std::make_unique<Event>();
  lanes_ = std::make_unique<RunLanes>(plan_.sub_layer().has_lanes());
  streamed_ = std::make_unique<Event>();
  fetch_mode_ = fetch_mode_from_environment();
  why_not_device_ = DeviceFetch::why_not(*cache_);
  if (why_not_device_.empty()) {
    device_fetch_ = std::make_unique<DeviceFetch>(*cache_, fetch_mode_, router_params_, router_bias_);
  } else if (fetch_mode_ == FetchMode::kDevice) {
    throw invalid("MoELayer: the device cannot fetch (MOE_INFER_FETCH=device): " + why_not_device_);
  }
  if (fetch_mode_ == FetchMode::kHost) why_not_device_ = "MOE_INFER_FETCH=host";
}

MoELayer::Experts MoELayer::who_brings(int64_t tokens, bool captures, bool ahead) const {
  auto const& config = plan_.config();
  int64_t const most_needed = std::min<int64_t>(tokens * config.top_k, config.expert_count);
  bool const fits = most_needed <= config.max_concurrency;
  if (device_fetch_ != nullptr && fits) {
    if (who_copies(tokens, captures, ahead) == Copier::kKernels) return Experts::kPlannedAndCopied;
    if (!captures && device_fetch_->host_can_copy()) return Experts::kPlanned;
  }
  if (captures) {
    std::string const why = !why_not_device_.empty()
                                ? why_not_device_
                                : std::to_string(tokens) + " tokens may need " + std::to_string(most_needed) +
                                      " experts, and there are " + std::to_string(config.max_concurrency) +
                                      " slots (max_concurrency)";
    throw invalid(
        "MoELayer: a CUDA graph can capture a layer that streams its experts only if the device fetches them: " + why +
        "; or set max_concurrency to expert_count (" + std::to_string(config.expert_count) +
        "), or do not use CUDA graphs");
  }
  return Experts::kFromHost;
}

Copier MoELayer::who_copies(int64_t tokens, bool captures, bool ahead) const {
  if (fetch_mode_ == FetchMode::kHost) return Copier::kHost;
  if (fetch_mode_ == FetchMode::kDevice || captures) return Copier::kKernels;
  bool const guesses = ahead && device_fetch_->host_can_copy();
  return tokens > kMostTokensForKernels || guesses ? Copier::kHost : device_fetch_->faster_copier();
}

std::optional<Copier> MoELayer::copier_of(Experts experts) {
  if (experts == Experts::kPlannedAndCopied) return Copier::kKernels;
  if (experts == Experts::kPlanned) return Copier::kHost;
  return std::nullopt;
}

MoELayer::~MoELayer() {
  if (device_fetch_ != nullptr && cache_->remembers()) {
    device_fetch_->hand_over(cache_.get());
  }
}

size_t MoELayer::workspace_bytes(int64_t tokens) const { return plan_.layout(tokens, nullptr, nullptr); }

void MoELayer::run(void const* hidden_states, void const* router_logits, NextLogits const& next, void* output,
                   int64_t tokens, void* workspace, size_t workspace_bytes, cudaStream_t stream) {
  Workspace slices;
  size_t const needed = plan_.layout(tokens, static_cast<uint8_t*>(workspace), &slices);
  if (tokens > 0) {  // empty tensors may have no address
    if (workspace_bytes < needed) {
      throw invalid("MoELayer: the workspace for " + std::to_string(tokens) + " tokens must have " +
                    std::to_string(needed) + " bytes, got " + std::to_string(workspace_bytes));
    }
    check_run(hidden_states, router_logits, next, output, workspace);
    if (plan_.streams()) {
      run_streaming(hidden_states, router_logits, next, output, tokens, slices, stream);
    } else {
      note_run(nullptr, nullptr);
      run_experts(Experts::kResident, hidden_states, router_logits, {}, output, tokens, slices, stream);
    }
  }
  ++runs_;
  tokens_ += tokens;
}

void MoELayer::run_streaming(void const* hidden_states, void const* router_logits, NextLogits const& next, void* output,
                             int64_t tokens, Workspace const& workspace, cudaStream_t stream) {
  std::lock_guard<std::mutex> const lock(streaming_);
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  MOE_CUDA_CHECK(cudaStreamIsCapturing(stream, &capture));
  bool const captures = capture != cudaStreamCaptureStatusNone;
  // When another thread captures a graph of its own, CUDA would refuse that this one waits for its stream, and would
  // give up that capture.
  std::optional<RelaxedCapture> relaxed;
  if (!captures) relaxed.emplace();
  bool const ahead = next.logits != nullptr && runs_single_token(tokens);
  auto const experts = who_brings(tokens, captures, ahead);
  if (device_fetch_ != nullptr) {
    device_fetch_->begin_run(experts == Experts::kPlanned, ahead);
  } else {
    note_run(nullptr, nullptr);
  }
  // On several streams: a fetch by the device must not overwrite what a run on another stream still reads. ExpertCache
  // knows that for each slot; the device does not. A graph cannot wait for what is outside of it.
  bool const in_turn = device_fetch_ != nullptr && !captures;
  if (in_turn) streamed_->order_before(stream);
  try {
    run_experts(experts, hidden_states, router_logits, next, output, tokens, workspace, stream);
    if (experts == Experts::kPlanned) device_fetch_->fetch_ahead();
  } catch (...) {
    if (in_turn) {
      if (copier_of(experts)) device_fetch_->forget(stream);
      streamed_->record(stream);  // part of the work may be enqueued
    }
    throw;
  }
  if (in_turn) streamed_->record(stream);
}

void MoELayer::run_experts(Experts experts, void const* hidden_states, void const* router_logits,
                           NextLogits const& next, void* output, int64_t tokens, Workspace const& workspace,
                           cudaStream_t stream) {
  auto const& config = plan_.config();
  auto const& inputs = plan_.inputs();
  auto const router = score(hidden_states, router_logits, tokens, workspace, stream);
  if (experts != Experts::kFromHost && runs_single_token(tokens) && plan_.sub_layer().has_run_token()) {
    run_token(experts, router, hidden_states, next, output, workspace, stream);
    return;
  }
  int64_t const rows = tokens * config.top_k;
  bool const overlap = experts != Experts::kFromHost && is_hopper();
  select_experts(router, tokens, workspace.routing, is_hopper(), stream);
  group(hidden_states, tokens, workspace, overlap, stream);
  if (experts == Experts::kFromHost) {
    run_from_host(rows, workspace, stream);
  } else {
    auto const copier = copier_of(experts);
    if (copier) device_fetch_->enqueue(*copier, workspace.routing.counts, overlap, stream);
    plan_.sub_layer().run(call(rows, workspace, all_groups(experts, workspace), overlap, stream));
  }
  combine(workspace.expert_output, hidden_states, inputs.dtype, config.router, tokens, inputs.d_model, config.top_k,
          workspace.routing, output, overlap, stream);
}

void MoELayer::check_run(void const* hidden_states, void const* router_logits, NextLogits const& next, void* output,
                         void const* workspace) const {
  check_aligned("hidden_states", hidden_states, kTensorAlignment);
  check_aligned("output", output, kTensorAlignment);
  check_aligned("workspace", workspace, kSliceAlignment);
  if (plan_.inputs().has_logits) {
    check_aligned("router_logits", router_logits, size_of(plan_.inputs().logits_dtype));
  }
  if (next.logits != nullptr) check_aligned("next_router_logits", next.logits, size_of(next.dtype));
  int const device = current_device();
  if (device != device_) {
    throw invalid("MoELayer: the layer was made on CUDA device " + std::to_string(device_) +
                  ", but the current device is " + std::to_string(device));
  }
}

TokenRouter MoELayer::score(void const* hidden_states, void const* router_logits, int64_t tokens,
                            Workspace const& workspace, cudaStream_t stream) const {
  auto const& config = plan_.config();
  auto const& inputs = plan_.inputs();
  if (inputs.has_logits) return {router_params_, router_logits, inputs.logits_dtype};
  float* const scores = workspace.routing.scores;
  compute_scores(hidden_states, inputs.dtype, router_weights_, config.router, tokens, inputs.d_model,
                 config.expert_count, scores, stream);
  return {router_params_, scores, DataType::kFloat32};
}

void MoELayer::group(void const* hidden_states, int64_t tokens, Workspace const& workspace, bool overlap,
                     cudaStream_t stream) const {
  auto const& config = plan_.config();
  auto const& inputs = plan_.inputs();
  auto const& routing = workspace.routing;
  group_by_expert(tokens, config.expert_count, config.top_k, routing, overlap, stream);
  gather_rows(hidden_states, inputs.dtype, tokens, inputs.d_model, config.top_k, routing, workspace.grouped, overlap,
              stream);
}

ExpertGroups MoELayer::all_groups(Experts experts, Workspace const& workspace) const {
  ExpertGroups groups;
  groups.count = plan_.config().expert_count;
  groups.row_begin = workspace.routing.row_begin;
  groups.row_end = workspace.routing.row_begin + 1;
  if (cache_ != nullptr) {
    groups.slot_of_group = cache_->slot_numbers();
    groups.slots = cache_->slots();
    groups.slot_bytes = cache_->slot_bytes();
  }
  if (copier_of(experts)) {
    groups.slot_of_group = device_fetch_->slot_of_expert();
    groups.arrivals = device_fetch_->arrivals();
  }
  return groups;
}

bool MoELayer::runs_single_token(int64_t tokens) const {
  return tokens == 1 && plan_.config().top_k <= TokenFeedForward::kMostChoices;
}

void MoELayer::run_token(Experts experts, TokenRouter const& router, void const* hidden_states, NextLogits const& next,
                         void* output, Workspace const& workspace, cudaStream_t stream) const {
  auto const& config = plan_.config();
  bool const overlap = is_hopper();
  auto const& routing = workspace.routing;
  TokenChoices token;
  token.hidden_states = hidden_states;
  token.expert_of_choice = routing.expert_of_choice;
  token.weight_of_choice = routing.weight_of_choice;
  token.top_k = config.top_k;
  token.keep = config.router == Router::kBaseLayer;
  token.output = output;
  if (auto const copier = copier_of(experts)) {
    device_fetch_->select_and_plan(*copier, router, routing, next, stream);
    token.slot_of_choice = device_fetch_->slot_of_choice();
    token.copy = device_fetch_->copy(*copier);
  } else if (config.expert_count <= kMostChosenByAll) {
    token.router = router;
  } else {
    select_experts(router, 1, routing, overlap, stream);
  }
  plan_.sub_layer().run_token(all_groups(experts, workspace), token, workspace.sub_layer, overlap, stream);
}

SubLayerCall MoELayer::call(int64_t rows, Workspace const& workspace, ExpertGroups const& groups, bool overlap,
                            cudaStream_t stream) const {
  SubLayerCall call;
  call.groups = groups;
  call.input = workspace.grouped;
  call.output = workspace.expert_output;
  call.rows = rows;
  call.expert_count = plan_.config().expert_count;
  call.counters = workspace.routing.counters;
  call.overlap = overlap;
  call.single_token = runs_single_token(rows / plan_.config().top_k);
  call.workspace = workspace.sub_layer;
  call.stream = stream;
  return call;
}

void MoELayer::run_from_host(int64_t rows, Workspace const& workspace, cudaStream_t stream) {
  auto* const counts = counts_.as<int32_t>();
  if (device_fetch_ != nullptr) device_fetch_->begin_take(stream);
  MOE_CUDA_CHECK(cudaMemcpyAsync(counts, workspace.routing.counts,
                                 sizeof(int32_t) * static_cast<size_t>(plan_.config().expert_count),
                                 cudaMemcpyDeviceToHost, stream));
  counts_read_->record(stream);
  counts_read_->wait();
  if (device_fetch_ != nullptr) device_fetch_->end_take(cache_.get(), stream);
  auto const groups = all_groups(Experts::kFromHost, workspace);
  auto const use = [&](int32_t expert, int32_t slot, int32_t lane) {
    auto one = call(rows, workspace, groups, false, lanes_->stream(lane));
    one.lane = lane;
    one.counters += lane * kCountersOfCall;
    one.groups.count = 1;
    one.groups.row_begin += expert;
    one.groups.row_end += expert;
    one.groups.slot_of_group += slot;
    plan_.sub_layer().run(one);
  };
  auto const end = [&] {
    lanes_->join();
    if (device_fetch_ != nullptr) device_fetch_->return_tables(*cache_, stream);
  };
  lanes_->fork(stream);
  try {
    cache_->run_needed(counts, *lanes_, use);
  } catch (...) {
    end();
    throw;
  }
  end();
}

std::string MoELayer::note() const {
  if (!plan_.streams()) return "";
  std::string note = cache_->note();
  if (!why_not_device_.empty()) {
    if (!note.empty()) note += "; ";
    note += "the host fetches its experts, which no CUDA graph can capture: " + why_not_device_;
  }
  return note;
}

LayerStatistics MoELayer::statistics() const {
  auto const& config = plan_.config();
  LayerStatistics statistics;
  statistics.id = live_.id();
  statistics.weight_prefix = config.weight_prefix;
  statistics.sublayer_type = config.sublayer_type;
  statistics.device = device_;
  statistics.expert_count = config.expert_count;
  statistics.streams = plan_.streams();
  statistics.counters.runs = runs_;
  statistics.counters.tokens = tokens_;
  statistics.counters.stall_ns = -1;  // when the host fetches it enqueues waits and does not see how long they are
  if (cache_ != nullptr) {
    cache_->add_statistics(&statistics);
    if (device_fetch_ != nullptr) device_fetch_->add_statistics(&statistics);
  }
  return statistics;
}

}  // namespace moe_infer
