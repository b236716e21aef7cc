#include "tensorrt/registration.h"

#include <NvInferRuntime.h>
#include <dlfcn.h>
#include <link.h>

#include <mutex>
#include <vector>

#include "core/capi_error.h"
#include "core/error.h"
#include "tensorrt/creator.h"

#define MOE_TEXT_OF(x) #x
#define MOE_TEXT(x) MOE_TEXT_OF(x)

namespace moe_infer {
namespace {

struct Loaded {
  std::string path;
  void* handle = nullptr;
  int32_t major = 0;
  std::string version;
};

// Paths of the loaded libraries that are libnvinfer itself, not one of its companions (libnvinfer_plugin, ...).
std::vector<std::string> loaded_paths() {
  std::vector<std::string> paths;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        std::string const path = info->dlpi_name == nullptr ? "" : info->dlpi_name;
        std::string const name = path.substr(path.rfind('/') + 1);
        if (name.rfind("libnvinfer.so", 0) == 0) static_cast<std::vector<std::string>*>(data)->push_back(path);
        return 0;
      },
      &paths);
  return paths;
}

// getInferLibVersion is major * 10000 + minor * 100 + patch since TensorRT 10, before that major * 1000 + ...
Loaded inspect(std::string const& path) {
  Loaded loaded;
  loaded.path = path;
  loaded.handle = dlopen(path.c_str(), RTLD_NOLOAD | RTLD_NOW);
  auto* const get_version =
      loaded.handle == nullptr ? nullptr : reinterpret_cast<int32_t (*)()>(dlsym(loaded.handle, "getInferLibVersion"));
  int32_t const number = get_version == nullptr ? 0 : get_version();
  int32_t const base = number >= 100000 ? 100 : 10;
  loaded.major = number / (base == 100 ? 10000 : 1000);
  loaded.version =
      std::to_string(loaded.major) + "." + std::to_string(number / 100 % base) + "." + std::to_string(number % 100);
  return loaded;
}

std::string own_path() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(&own_path), &info) == 0 || info.dli_fname == nullptr) return "libmoe_infer.so";
  return info.dli_fname;
}

Loaded find_tensorrt() {
  std::string const ours = own_path() + " was built with the headers of TensorRT " + tensorrt_headers_version();
  Loaded other;
  for (std::string const& path : loaded_paths()) {
    Loaded const loaded = inspect(path);
    if (loaded.major == NV_TENSORRT_MAJOR) return loaded;
    other = loaded;
  }
  std::string const major = MOE_TEXT(NV_TENSORRT_MAJOR);
  if (other.path.empty()) {
    throw invalid("moe_infer: no TensorRT is loaded in this process; " + ours +
                  ": import tensorrt first, or load libnvinfer.so." + major);
  }
  throw invalid("moe_infer: this process has loaded TensorRT " + other.version + " (" + other.path + "), but " + ours +
                ": use TensorRT " + major + ", or build the plugin with the headers of TensorRT " +
                std::to_string(other.major) + " (python setup.py build_ext --tensorrt-prefix=DIR)");
}

std::mutex registration_mutex;
nvinfer1::ILogger* (*get_logger)() = nullptr;

}  // namespace

char const* tensorrt_headers_version() {
  return MOE_TEXT(NV_TENSORRT_MAJOR) "." MOE_TEXT(NV_TENSORRT_MINOR) "." MOE_TEXT(NV_TENSORRT_PATCH);
}

void register_creators() {
  std::lock_guard<std::mutex> const lock(registration_mutex);
  static bool registered = false;
  if (registered) return;
  Loaded const tensorrt = find_tensorrt();
  auto* const get_registry =
      reinterpret_cast<nvinfer1::IPluginRegistry* (*)()>(dlsym(tensorrt.handle, "getPluginRegistry"));
  nvinfer1::IPluginRegistry* const registry = get_registry == nullptr ? nullptr : get_registry();
  if (registry == nullptr) throw invalid("moe_infer: " + tensorrt.path + " has no plugin registry");
  get_logger = reinterpret_cast<nvinfer1::ILogger* (*)()>(dlsym(tensorrt.handle, "getLogger"));
  for (nvinfer1::IPluginCreatorInterface* creator : creators()) {
    if (!registry->registerCreator(*creator, "")) {
      throw invalid("moe_infer: TensorRT " + tensorrt.version + " (" + tensorrt.path +
                    ") did not take the plugin MoELayer; was another build of the plugin loaded before?");
    }
  }
  registered = true;
}

void log_error(std::string const& message) noexcept {
  set_last_error(message.c_str());
  nvinfer1::ILogger* const logger = get_logger == nullptr ? nullptr : get_logger();
  if (logger != nullptr) logger->log(nvinfer1::ILogger::Severity::kERROR, message.c_str());
}

namespace {

// Loaded by ONNX Runtime's option trt_extra_plugin_lib_paths nobody calls moe_infer_register: where TensorRT is there
// already, the library registers by itself; where not, that is for moe_infer_register to say.
struct RegisterWhenLoaded {
  RegisterWhenLoaded() {
    try {
      register_creators();
    } catch (...) {
    }
  }
} const register_when_loaded;

}  // namespace
}  // namespace moe_infer
