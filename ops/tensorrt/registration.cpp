// Registers the creators with the TensorRT in the process, and what TensorRT asks a plugin library for.
#include <NvInferRuntime.h>
#include <NvInferVersion.h>
#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <mutex>
#include <string>

#include "core/capi_error.h"
#include "tensorrt/creator.h"
#include "tensorrt/loaded_tensorrt.h"
#include "tensorrt/log.h"
#include "tensorrt/tensor_desc.h"

namespace moe_infer {
namespace {

constexpr int32_t kCreators = 2;

// Never destroyed: TensorRT keeps pointers to them to the end of the process.
nvinfer1::IPluginCreatorInterface** creators() {
  static nvinfer1::IPluginCreatorInterface* list[kCreators] = {new MoELayerCreator("MoELayer"),
                                                               new MoELayerCreator("MoELayerPlugin")};
  return list;
}

std::mutex registration_mutex;
nvinfer1::IPluginRegistry* registered_with = nullptr;
std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};
std::atomic<nvinfer1::ILogger* (*)() noexcept> get_logger{nullptr};

bool is_registered(nvinfer1::IPluginRegistry const& registry, nvinfer1::IPluginCreatorInterface const* creator) {
  int32_t count = 0;
  auto const* const all = registry.getAllCreators(&count);
  for (int32_t i = 0; i < count; ++i) {
    if (all[i] == creator) {
      return true;
    }
  }
  return false;
}

// The registry keeps pointers into this library: it must stay when whoever loaded it closes it.
void stay_loaded() {
  Dl_info info = {};
  if (dladdr(reinterpret_cast<void*>(&stay_loaded), &info) != 0 && info.dli_fname != nullptr) {
    dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD | RTLD_NODELETE);
  }
}

void register_creators() {
  std::lock_guard<std::mutex> const lock(registration_mutex);
  auto const tensorrt = matching_tensorrt();
  auto* const registry = tensorrt.registry();
  if (registry == nullptr) {
    throw invalid("moe_infer: " + tensorrt.text() + " has no plugin registry");
  }
  if (registry == registered_with) {
    return;
  }
  get_logger = reinterpret_cast<nvinfer1::ILogger* (*)() noexcept>(dlsym(tensorrt.handle, "getLogger"));
  stay_loaded();
  for (int32_t i = 0; i < kCreators; ++i) {
    auto* const creator = creators()[i];
    if (!is_registered(*registry, creator) && !registry->registerCreator(*creator, "")) {
      throw invalid(
          "moe_infer: " + tensorrt.text() +
          " refuses the plugin creators; another copy of libmoe_infer.so may be loaded, or another plugin has "
          "the name MoELayer");
    }
  }
  registered_with = registry;
}

void deregister_creators() {
  std::lock_guard<std::mutex> const lock(registration_mutex);
  if (registered_with != nullptr) {
    for (int32_t i = 0; i < kCreators; ++i) {
      registered_with->deregisterCreator(*creators()[i]);
    }
    registered_with = nullptr;
  }
}

// Loaded beside a matching TensorRT the library registers by itself: this serves ONNX Runtime's provider option
// trt_extra_plugin_lib_paths, which only loads it. Anything else waits for moe_infer_register, which says why not.
__attribute__((constructor)) void register_at_load() { guarded(register_creators); }

}  // namespace

void log_message(nvinfer1::ILogger::Severity severity, char const* message) noexcept {
  nvinfer1::ILogger* logger = nullptr;
  try {
    auto* const finder = logger_finder.load();
    logger = finder == nullptr ? nullptr : finder->findLogger();
  } catch (...) {  // TensorRT's method is not noexcept
  }
  auto* const get = get_logger.load();
  if (logger == nullptr && get != nullptr) {
    logger = get();
  }
  if (logger != nullptr) {
    logger->log(severity, message);
  } else {
    std::fprintf(stderr, "%s\n", message);
  }
}

}  // namespace moe_infer

extern "C" {

const char* moe_infer_tensorrt_headers_version(void) {
  static std::string const version = std::to_string(NV_TENSORRT_MAJOR) + "." + std::to_string(NV_TENSORRT_MINOR) + "." +
                                     std::to_string(NV_TENSORRT_PATCH);
  return version.c_str();
}

int moe_infer_register(void) { return moe_infer::guarded(moe_infer::register_creators); }

// TensorRT calls these two when it loads a plugin library itself (IPluginRegistry::loadLibrary, trtexec).
MOE_INFER_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { moe_infer::logger_finder = finder; }

MOE_INFER_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  // TensorRT registers what it gets here, and refuses the library if something is registered already.
  moe_infer::guarded(moe_infer::deregister_creators);
  count = moe_infer::kCreators;
  return moe_infer::creators();
}

}  // extern "C"
