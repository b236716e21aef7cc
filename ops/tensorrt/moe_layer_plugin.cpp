#include "tensorrt/moe_layer_plugin.h"

#include <algorithm>
#include <limits>
#include <new>
#include <string>
#include <utility>

#include "core/cuda_check.h"
#include "tensorrt/log.h"
#include "tensorrt/tensor_desc.h"

namespace moe_infer {
namespace {

using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorRTPhase;

constexpr int32_t kHiddenStates = 0;
constexpr int32_t kRouterLogits = 1;
constexpr int32_t kNextRouterLogits = 2;

bool same(LayerInputs const& a, LayerInputs const& b) {
  return a.d_model == b.d_model && a.dtype == b.dtype && a.has_logits == b.has_logits &&
         (!a.has_logits || a.logits_dtype == b.logits_dtype);
}

LayerInputs inputs_of(DynamicPluginTensorDesc const* inputs, int32_t count) {
  check_input_count(count);
  return to_inputs(inputs[kHiddenStates].desc, count > kRouterLogits ? &inputs[kRouterLogits].desc : nullptr);
}

}  // namespace

MoELayerPlugin::MoELayerPlugin(char const* creator_name, PluginFields fields, TensorRTPhase phase)
    : creator_name_(creator_name), phase_(phase), fields_(std::move(fields)), config_(fields_.config()) {
  if (phase_ == TensorRTPhase::kRUNTIME) {
    // From an engine. ONNX Runtime 1.31 ends the process when an engine in its cache cannot be loaded, so a file that
    // is gone or has changed since is no reason to refuse: it is logged now, and is the error of every run.
    keep_failure(guarded_by_log([&] { ExpertStore::open(config_, config_.embedding_size); }));
    return;
  }
  auto const store = ExpertStore::open(config_, config_.embedding_size);
  if (!store->tensors().empty() && config_.weight_digest.empty()) {
    // The engine remembers for which file it was built: the check of this attribute finds a changed file when the
    // engine is loaded.
    config_.weight_digest = store->digest();
    fields_.set_digest(store->digest());
  }
}

MoELayerPlugin::MoELayerPlugin(MoELayerPlugin const& other)
    : nvinfer1::IPluginV3(other),
      nvinfer1::IPluginV3OneCore(other),
      nvinfer1::IPluginV3OneBuild(other),
      nvinfer1::IPluginV3OneRuntime(other),
      creator_name_(other.creator_name_),
      phase_(other.phase_),
      fields_(other.fields_),
      config_(other.config_) {}

nvinfer1::IPluginCapability* MoELayerPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* MoELayerPlugin::clone() noexcept {
  nvinfer1::IPluginV3* copy = nullptr;
  guarded_by_log([&] { copy = new MoELayerPlugin(*this); });
  return copy;
}

nvinfer1::AsciiChar const* MoELayerPlugin::getPluginVersion() const noexcept { return kPluginVersion; }

int32_t MoELayerPlugin::getOutputDataTypes(nvinfer1::DataType* output_types, int32_t output_count,
                                           nvinfer1::DataType const* input_types, int32_t input_count) const noexcept {
  return guarded_by_log([&] {
    check_input_count(input_count);
    check_output_count(output_count);
    // Not checked further: before a network's types are settled TensorRT asks with what it has.
    output_types[0] = input_types[kHiddenStates];
  });
}

int32_t MoELayerPlugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t input_count,
                                        nvinfer1::DimsExprs const*, int32_t, nvinfer1::DimsExprs* outputs,
                                        int32_t output_count, nvinfer1::IExprBuilder&) noexcept {
  return guarded_by_log([&] {
    check_input_count(input_count);
    check_output_count(output_count);
    auto const& hidden_states = inputs[kHiddenStates];
    check_rank(hidden_states.nbDims);
    auto const* const last = hidden_states.d[hidden_states.nbDims - 1];
    if (last->isConstant()) {
      // Now, while the network is made, rather than when it is built: types do not matter to these checks.
      LayerInputs known;
      known.d_model = last->getConstantValue();
      known.has_logits = input_count > kRouterLogits;
      config_.check_inputs(known);
      ExpertStore::open(config_, known.d_model);
    }
    outputs[0] = hidden_states;
  });
}

bool MoELayerPlugin::supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors,
                                               int32_t input_count, int32_t output_count) noexcept {
  if (input_count < 1 || input_count > kMostInputs || output_count != 1 || position < 0 || position > input_count) {
    return false;
  }
  auto const& tensor = tensors[position].desc;
  if (tensor.format != nvinfer1::TensorFormat::kLINEAR || !is_layer_type(tensor.type)) {
    return false;
  }
  if (position == kHiddenStates || tensor.type == tensors[kHiddenStates].desc.type) {
    return true;
  }
  return position < input_count && tensor.type == nvinfer1::DataType::kFLOAT;  // logits
}

int32_t MoELayerPlugin::configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t input_count,
                                        DynamicPluginTensorDesc const*, int32_t output_count) noexcept {
  return guarded_by_log([&] {
    check_output_count(output_count);
    auto const known = inputs_of(inputs, input_count);
    LayerPlan const plan(config_, known);
    ExpertStore::open(config_, known.d_model);
    fields_.remember_inputs(known);
    auto const& most = inputs[kHiddenStates].max;
    if (std::all_of(most.d, most.d + most.nbDims, [](auto dimension) { return dimension >= 0; })) {
      int64_t const tokens = count_tokens(most);
      fields_.remember_workspace({tokens, plan.layout(tokens, nullptr, nullptr)});
    }
  });
}

size_t MoELayerPlugin::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t input_count,
                                        DynamicPluginTensorDesc const*, int32_t) const noexcept {
  size_t bytes = 0;
  guarded_by_log([&] {
    LayerPlan const plan(config_, inputs_of(inputs, input_count));
    bytes = plan.layout(count_tokens(inputs[kHiddenStates].max), nullptr, nullptr);
  });
  return bytes;
}

nvinfer1::IPluginV3* MoELayerPlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
  std::unique_ptr<MoELayerPlugin> attached;
  guarded_by_log([&] { attached.reset(new MoELayerPlugin(*this)); });  // NOLINT: the constructor is private
  if (attached != nullptr && phase_ == TensorRTPhase::kRUNTIME) {
    attached->keep_failure(guarded_by_log([&] {
      if (auto const inputs = fields_.inputs()) {
        attached->make_layer(*inputs);
      }
    }));
  }
  return attached.release();
}

void MoELayerPlugin::keep_failure(int32_t status) noexcept {
  try {
    failure_ = status == 0 ? "" : moe_infer_last_error();
  } catch (...) {  // without memory for the sentence run has its own
    failure_.clear();
  }
}

// TensorRT gives a run the workspace that the engine was built with.
void MoELayerPlugin::check_workspace() const {
  auto const inputs = fields_.inputs();
  auto const asked = fields_.workspace();
  if (!inputs || !asked) return;
  size_t const needed = LayerPlan(config_, *inputs).layout(asked->tokens, nullptr, nullptr);
  if (needed <= asked->bytes) return;
  throw invalid("MoELayer: the engine was built by another version of moe_infer: it has a workspace of " +
                std::to_string(asked->bytes) + " bytes for " + std::to_string(asked->tokens) +
                " tokens, and this version needs " + std::to_string(needed) +
                "; delete the engine (ONNX Runtime: in the folder trt_engine_cache_path) and build it again");
}

void MoELayerPlugin::make_layer(LayerInputs const& inputs) {
  check_workspace();
  layer_.reset();  // its memory, before more is taken
  layer_ = std::make_unique<MoELayer>(config_, inputs);
  auto const note = layer_->note();
  if (!note.empty()) {
    log_message(nvinfer1::ILogger::Severity::kWARNING, note.c_str());
  }
}

int32_t MoELayerPlugin::onShapeChange(PluginTensorDesc const* inputs, int32_t input_count, PluginTensorDesc const*,
                                      int32_t output_count) noexcept {
  int32_t const status = guarded_by_log([&] {
    check_input_count(input_count);
    check_output_count(output_count);
    auto const* const logits = input_count > kRouterLogits ? &inputs[kRouterLogits] : nullptr;
    auto const known = to_inputs(inputs[kHiddenStates], logits);
    config_.check_inputs(known);
    if (logits != nullptr) {
      check_logits(inputs[kHiddenStates].dims, logits->dims, config_.expert_count);
    }
    has_next_logits_ = input_count > kNextRouterLogits;
    if (has_next_logits_) {
      check_next_logits(inputs[kHiddenStates].dims, inputs[kNextRouterLogits].dims);
    }
    // Made when the context was, unless the engine was configured last for another type than it settled on.
    if (phase_ == TensorRTPhase::kRUNTIME && (layer_ == nullptr || !same(layer_->plan().inputs(), known))) {
      make_layer(known);
    }
  });
  keep_failure(status);
  return status;
}

int32_t MoELayerPlugin::enqueue(PluginTensorDesc const* input_desc, PluginTensorDesc const*, void const* const* inputs,
                                void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
  return guarded_by_log([&] { run(input_desc, inputs, outputs, workspace, stream); });
}

void MoELayerPlugin::run(PluginTensorDesc const* input_desc, void const* const* inputs, void* const* outputs,
                         void* workspace, cudaStream_t stream) {
  auto const& dims = input_desc[kHiddenStates].dims;
  check_rank(dims.nbDims);
  int64_t const tokens = count_tokens(dims);
  if (phase_ == TensorRTPhase::kBUILD) {
    // While it builds, TensorRT runs layers on arbitrary data to time them. There is one tactic, so the time decides
    // nothing; loading gigabytes of weights for it would make building slow, and would disturb caches and statistics.
    size_t const bytes = static_cast<size_t>(tokens) * static_cast<size_t>(dims.d[dims.nbDims - 1]) *
                         size_of(to_data_type(input_desc[kHiddenStates].type));
    if (bytes > 0) {
      MOE_CUDA_CHECK(cudaMemsetAsync(outputs[0], 0, bytes, stream));
    }
    return;
  }
  if (layer_ == nullptr) {
    throw invalid(failure_.empty() ? "MoELayer: TensorRT runs a plugin that it did not attach to a context" : failure_);
  }
  NextLogits next;
  if (has_next_logits_) {
    auto const& desc = input_desc[kNextRouterLogits];
    next = {inputs[kNextRouterLogits], static_cast<int32_t>(desc.dims.d[desc.dims.nbDims - 1]),
            to_data_type(desc.type)};
  }
  // TensorRT does not say the size of the workspace here: check_workspace.
  layer_->run(inputs[kHiddenStates], layer_->plan().inputs().has_logits ? inputs[kRouterLogits] : nullptr, next,
              outputs[0], tokens, workspace, std::numeric_limits<size_t>::max(), stream);
}

nvinfer1::PluginFieldCollection const* MoELayerPlugin::getFieldsToSerialize() noexcept {
  int32_t const status = guarded_by_log([&] {
    fields_.serialize(&serialized_);
    serialized_collection_ = {static_cast<int32_t>(serialized_.size()), serialized_.data()};
  });
  return status == 0 ? &serialized_collection_ : nullptr;
}

}  // namespace moe_infer
