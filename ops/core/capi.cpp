// The part of the C entry that runs a layer; what needs no GPU is in capi_check.cpp.
#include <memory>

#include "core/capi_error.h"
#include "core/layer.h"
#include "core/live_layers.h"

using moe_infer::guarded;
using moe_infer::invalid;

struct moe_infer_layer {
  moe_infer::MoELayer layer;
};

namespace {

// As guarded, and forgets the CUDA error that was just reported, so that the next launch does not report it again.
template <class Function>
int guarded_cuda(Function&& function) noexcept {
  int const status = guarded(std::forward<Function>(function));
  if (status == MOE_INFER_CUDA) {
    cudaGetLastError();
  }
  return status;
}

void check_not_null(char const* function, char const* name, void const* pointer) {
  if (pointer == nullptr) {
    throw invalid(std::string(function) + ": " + name + " must not be NULL");
  }
}

void report(moe_infer::LayerStatistics const& found, moe_infer_report_visitor visit, void* context) {
  moe_infer_layer_report told = {};
  told.id = found.id;
  told.weight_file = found.weight_file.c_str();
  told.weight_prefix = found.weight_prefix.c_str();
  told.sublayer_type = found.sublayer_type.c_str();
  told.device = found.device;
  told.streams = found.streams ? 1 : 0;
  told.expert_count = found.expert_count;
  told.slots = found.slots;
  told.slot_bytes = found.slot_bytes;
  told.stats = found.counters;
  told.uses = found.uses.empty() ? nullptr : found.uses.data();
  told.slot_of_expert = found.slot_of_expert.empty() ? nullptr : found.slot_of_expert.data();
  visit(&told, context);
}

void check_visitor(char const* function, moe_infer_report_visitor visit) {
  if (visit == nullptr) {
    throw invalid(std::string(function) + ": visit must not be NULL");
  }
}

}  // namespace

extern "C" {

const char* moe_infer_version(void) { return MOE_INFER_VERSION; }

#if !MOE_INFER_WITH_TENSORRT
const char* moe_infer_tensorrt_headers_version(void) { return ""; }

int moe_infer_register(void) {
  return guarded(
      [] { throw invalid("moe_infer: this library was built without TensorRT; build it with -Dtensorrt=enabled"); });
}
#endif

int moe_infer_layer_create(const moe_infer_attribute* attributes, int32_t count, const moe_infer_inputs* inputs,
                           moe_infer_layer** layer) {
  return guarded_cuda([&] {
    check_not_null("moe_infer_layer_create", "inputs", inputs);
    check_not_null("moe_infer_layer_create", "layer", layer);
    *layer = nullptr;
    auto const config = moe_infer::LayerConfig::from_attributes(attributes, count);
    *layer = new moe_infer_layer{{config, moe_infer::parse_inputs(*inputs)}};
  });
}

void moe_infer_layer_destroy(moe_infer_layer* layer) {
  delete layer;
  cudaGetLastError();  // what CUDA refused to free is not the next call's error
}

int moe_infer_layer_workspace(const moe_infer_layer* layer, int64_t tokens, size_t* bytes) {
  return guarded_cuda([&] {
    check_not_null("moe_infer_layer_workspace", "layer", layer);
    check_not_null("moe_infer_layer_workspace", "bytes", bytes);
    *bytes = layer->layer.workspace_bytes(tokens);
  });
}

int moe_infer_layer_run(moe_infer_layer* layer, const void* hidden_states, const void* router_logits, void* output,
                        int64_t tokens, void* workspace, size_t workspace_bytes, void* stream) {
  return moe_infer_layer_run_ahead(layer, hidden_states, router_logits, nullptr, output, tokens, workspace,
                                   workspace_bytes, stream);
}

int moe_infer_layer_run_ahead(moe_infer_layer* layer, const void* hidden_states, const void* router_logits,
                              const moe_infer_next_logits* next, void* output, int64_t tokens, void* workspace,
                              size_t workspace_bytes, void* stream) {
  return guarded_cuda([&] {
    check_not_null("moe_infer_layer_run", "layer", layer);
    moe_infer::NextLogits given;
    if (next != nullptr && next->logits != nullptr) {
      given = {next->logits, next->expert_count, moe_infer::parse_dtype("next_router_logits", next->dtype)};
    }
    layer->layer.run(hidden_states, router_logits, given, output, tokens, workspace, workspace_bytes,
                     static_cast<cudaStream_t>(stream));
  });
}

int moe_infer_layer_visit(const moe_infer_layer* layer, moe_infer_report_visitor visit, void* context) {
  return guarded_cuda([&] {
    check_not_null("moe_infer_layer_visit", "layer", layer);
    check_visitor("moe_infer_layer_visit", visit);
    report(layer->layer.statistics(), visit, context);
  });
}

int moe_infer_visit_layers(moe_infer_report_visitor visit, void* context) {
  return guarded_cuda([&] {
    check_visitor("moe_infer_visit_layers", visit);
    for (auto const& found : moe_infer::statistics_of_live_layers()) {
      report(found, visit, context);
    }
  });
}

int moe_infer_layer_stats(const moe_infer_layer* layer, moe_infer_stats* stats) {
  return guarded_cuda([&] {
    check_not_null("moe_infer_layer_stats", "layer", layer);
    check_not_null("moe_infer_layer_stats", "stats", stats);
    *stats = layer->layer.statistics().counters;
  });
}

}  // extern "C"
