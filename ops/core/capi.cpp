// The part of the C entry that runs a layer; what needs no GPU is in capi_check.cpp.
#include <memory>

#include "core/capi_error.h"
#include "core/layer.h"

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

void moe_infer_layer_destroy(moe_infer_layer* layer) { delete layer; }

int moe_infer_layer_workspace(const moe_infer_layer* layer, int64_t tokens, size_t* bytes) {
  return guarded_cuda([&] {
    check_not_null("moe_infer_layer_workspace", "layer", layer);
    check_not_null("moe_infer_layer_workspace", "bytes", bytes);
    *bytes = layer->layer.workspace_bytes(tokens);
  });
}

int moe_infer_layer_run(moe_infer_layer* layer, const void* hidden_states, const void* router_logits, void* output,
                        int64_t tokens, void* workspace, size_t workspace_bytes, void* stream) {
  return guarded_cuda([&] {
    check_not_null("moe_infer_layer_run", "layer", layer);
    layer->layer.run(hidden_states, router_logits, output, tokens, workspace, workspace_bytes,
                     static_cast<cudaStream_t>(stream));
  });
}

int moe_infer_layer_stats(const moe_infer_layer* layer, moe_infer_stats* stats) {
  return guarded([&] {
    check_not_null("moe_infer_layer_stats", "layer", layer);
    check_not_null("moe_infer_layer_stats", "stats", stats);
    *stats = layer->layer.stats();
  });
}

}  // extern "C"
