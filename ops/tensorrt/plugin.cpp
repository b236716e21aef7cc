#include "tensorrt/plugin.h"

#include <utility>

#include "core/cuda_check.h"
#include "core/error.h"
#include "core/expert_store.h"
#include "tensorrt/registration.h"

namespace moe_infer {
namespace {

using nvinfer1::PluginTensorDesc;
using TrtType = nvinfer1::DataType;

// What the inputs are is known when the engine is built, and needed when a context attaches: it travels with the
// attributes, under names that no attribute has.
constexpr char kDModel[] = "built_d_model";
constexpr char kDtype[] = "built_dtype";
constexpr char kLogitsDtype[] = "built_logits_dtype";  // -1: no router_logits

// TensorRT's methods must not throw: logs, and gives the error value.
template <class Value, class Function>
Value guard(Value error_value, Function&& function) noexcept {
  try {
    return function();
  } catch (std::exception const& error) {
    log_error(error.what());
  } catch (...) {
    log_error("MoELayer: unknown error");
  }
  return error_value;
}

bool is_supported(TrtType type) { return type == TrtType::kFLOAT || type == TrtType::kHALF || type == TrtType::kBF16; }

DataType from_tensorrt(char const* input, TrtType type) {
  switch (type) {
    case TrtType::kFLOAT:
      return DataType::kFloat32;
    case TrtType::kHALF:
      return DataType::kFloat16;
    case TrtType::kBF16:
      return DataType::kBFloat16;
    default:
      throw invalid(std::string("MoELayer: input ") + input +
                    " must be float32, float16 or bfloat16, got TensorRT's data type " +
                    std::to_string(static_cast<int32_t>(type)));
  }
}

void check_input_count(int32_t count) {
  if (count != 1 && count != 2) {
    throw invalid("MoELayer: expected hidden_states and optionally router_logits, got " + std::to_string(count) +
                  " inputs");
  }
}

// Dynamic dimensions are -1; the last one must be known.
LayerInputs read_inputs(PluginTensorDesc const* inputs, int32_t count, int32_t expert_count) {
  check_input_count(count);
  auto const& shape = inputs[0].dims;
  if (shape.nbDims != 2 && shape.nbDims != 3) {
    throw invalid("MoELayer: hidden_states must have shape (tokens, d_model) or (batch, seq, d_model), got rank " +
                  std::to_string(shape.nbDims));
  }
  LayerInputs result;
  result.d_model = shape.d[shape.nbDims - 1];
  result.dtype = from_tensorrt("hidden_states", inputs[0].type);
  result.has_logits = count == 2;
  if (result.has_logits) {
    auto const& logits = inputs[1].dims;
    result.logits_dtype = from_tensorrt("router_logits", inputs[1].type);
    if (logits.nbDims < 1 || logits.d[logits.nbDims - 1] != expert_count) {
      throw invalid(
          "MoELayer: the last dimension of router_logits must be expert_count = " + std::to_string(expert_count) +
          ", got " + std::to_string(logits.nbDims < 1 ? 0 : logits.d[logits.nbDims - 1]));
    }
  }
  return result;
}

bool same(LayerInputs const& a, LayerInputs const& b) {
  return a.d_model == b.d_model && a.dtype == b.dtype && a.has_logits == b.has_logits &&
         a.logits_dtype == b.logits_dtype;
}

// Product of all dimensions but the last.
int64_t rows_of(nvinfer1::Dims const& shape) {
  int64_t rows = 1;
  for (int32_t i = 0; i + 1 < shape.nbDims; ++i) rows *= shape.d[i];
  return rows;
}

}  // namespace

Plugin::Plugin(std::string name, Attributes attributes, nvinfer1::TensorRTPhase phase)
    : name_(std::move(name)), attributes_(std::move(attributes)), building_(phase == nvinfer1::TensorRTPhase::kBUILD) {
  LayerInputs built;
  built.d_model = attributes_.take_int(kDModel, 0);
  built.dtype = static_cast<DataType>(attributes_.take_int(kDtype, 0));
  int32_t const logits_dtype = attributes_.take_int(kLogitsDtype, -1);
  built.has_logits = logits_dtype >= 0;
  if (built.has_logits) built.logits_dtype = static_cast<DataType>(logits_dtype);

  config_ = attributes_.config();
  int64_t const d_model = built.d_model != 0 ? built.d_model : config_.embedding_size;
  auto const store = ExpertStore::open(config_, d_model);
  // From here on the engine belongs to this file: an engine that is loaded again finds the digest among its attributes.
  config_.weight_digest = store->digest();
  attributes_.set_string("expert_weight_digest", store->digest());
  if (built.d_model != 0) set_inputs(built);
}

Plugin::Plugin(Plugin const& other)
    : name_(other.name_),
      attributes_(other.attributes_),
      config_(other.config_),
      inputs_(other.inputs_),
      building_(other.building_) {}

void Plugin::set_inputs(LayerInputs const& inputs) {
  config_.check_inputs(inputs);
  inputs_ = inputs;
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
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

nvinfer1::IPluginV3* Plugin::clone() noexcept {
  return guard<nvinfer1::IPluginV3*>(nullptr, [&] { return new Plugin(*this); });
}

int32_t Plugin::getOutputDataTypes(TrtType* output_types, int32_t output_count, TrtType const* input_types,
                                   int32_t input_count) const noexcept {
  return guard(-1, [&] {
    check_input_count(input_count);
    if (output_count != 1) throw invalid("MoELayer: one output expected, got " + std::to_string(output_count));
    output_types[0] = input_types[0];
    return 0;
  });
}

int32_t Plugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t input_count, nvinfer1::DimsExprs const*,
                                int32_t, nvinfer1::DimsExprs* outputs, int32_t output_count,
                                nvinfer1::IExprBuilder&) noexcept {
  return guard(-1, [&] {
    check_input_count(input_count);
    if (output_count != 1) throw invalid("MoELayer: one output expected, got " + std::to_string(output_count));
    outputs[0] = inputs[0];
    return 0;
  });
}

// Row-major everywhere; router_logits in the type of hidden_states or float32, the output in that of hidden_states.
bool Plugin::supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* descriptions,
                                       int32_t input_count, int32_t output_count) noexcept {
  if (input_count < 1 || input_count > 2 || output_count != 1 || position > input_count) return false;
  auto const& description = descriptions[position].desc;
  if (description.format != nvinfer1::TensorFormat::kLINEAR || !is_supported(description.type)) return false;
  if (position == 0) return true;
  bool const as_hidden_states = description.type == descriptions[0].desc.type;
  return position == input_count ? as_hidden_states : as_hidden_states || description.type == TrtType::kFLOAT;
}

int32_t Plugin::configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t input_count,
                                nvinfer1::DynamicPluginTensorDesc const*, int32_t) noexcept {
  return guard(-1, [&] {
    check_input_count(input_count);
    PluginTensorDesc const descriptions[2] = {inputs[0].desc, inputs[input_count - 1].desc};
    set_inputs(read_inputs(descriptions, input_count, config_.expert_count));
    ExpertStore::open(config_, inputs_.d_model);  // the file against d_model, which the attributes need not say
    return 0;
  });
}

size_t Plugin::getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t input_count,
                                nvinfer1::DynamicPluginTensorDesc const*, int32_t) const noexcept {
  return guard<size_t>(0, [&] {
    check_input_count(input_count);
    PluginTensorDesc const descriptions[2] = {inputs[0].desc, inputs[input_count - 1].desc};
    LayerPlan const plan(config_, read_inputs(descriptions, input_count, config_.expert_count));
    return plan.layout(rows_of(inputs[0].max), nullptr, nullptr);
  });
}

int32_t Plugin::onShapeChange(PluginTensorDesc const* inputs, int32_t input_count, PluginTensorDesc const*,
                              int32_t) noexcept {
  return guard(-1, [&] {
    LayerInputs const now = read_inputs(inputs, input_count, config_.expert_count);
    if (inputs_.d_model != 0 && same(now, inputs_)) return 0;
    // Built for other types than the ones that the engine chose in the end.
    set_inputs(now);
    if (layer_ != nullptr) layer_ = std::make_shared<MoELayer>(config_, inputs_);
    return 0;
  });
}

// While TensorRT builds, it may run layers on arbitrary data to time them. That must neither read the weights nor
// disturb a cache, and there is nothing to choose from: the plugin has one tactic. So the output is only cleared.
int32_t Plugin::enqueue(PluginTensorDesc const* input_descriptions, PluginTensorDesc const*, void const* const* inputs,
                        void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
  return guard(-1, [&] {
    int64_t const tokens = rows_of(input_descriptions[0].dims);
    if (building_) {
      auto const bytes = static_cast<size_t>(tokens * inputs_.d_model) * size_of(inputs_.dtype);
      MOE_CUDA_CHECK(cudaMemsetAsync(outputs[0], 0, bytes, stream));
      return 0;
    }
    if (layer_ == nullptr) throw invalid("MoELayer: run without an execution context");
    layer_->run(inputs[0], inputs_.has_logits ? inputs[1] : nullptr, outputs[0], tokens, workspace,
                tokens == 0 ? 0 : layer_->workspace_bytes(tokens), stream);
    return 0;
  });
}

nvinfer1::IPluginV3* Plugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
  return guard<nvinfer1::IPluginV3*>(nullptr, [&] {
    auto attached = std::make_unique<Plugin>(*this);
    if (!building_) attached->layer_ = std::make_shared<MoELayer>(config_, inputs_);
    return attached.release();
  });
}

nvinfer1::PluginFieldCollection const* Plugin::getFieldsToSerialize() noexcept {
  return guard<nvinfer1::PluginFieldCollection const*>(nullptr, [&] {
    attributes_.set_int(kDModel, static_cast<int32_t>(inputs_.d_model));
    attributes_.set_int(kDtype, static_cast<int32_t>(inputs_.dtype));
    attributes_.set_int(kLogitsDtype, inputs_.has_logits ? static_cast<int32_t>(inputs_.logits_dtype) : -1);
    serialised_ = attributes_.fields();
    collection_.nbFields = static_cast<int32_t>(serialised_.size());
    collection_.fields = serialised_.data();
    return &collection_;
  });
}

}  // namespace moe_infer
