#include "tensorrt/loaded_tensorrt.h"

#include <NvInferVersion.h>
#include <dlfcn.h>
#include <link.h>

#include "core/error.h"

namespace moe_infer {
namespace {

// Of libnvinfer itself, not of libnvinfer_plugin and the like.
bool is_tensorrt(std::string const& path) {
  auto const slash = path.rfind('/');
  return path.compare(slash == std::string::npos ? 0 : slash + 1, 14, "libnvinfer.so.") == 0 ||
         (path.size() >= 13 && path.compare(path.size() - 13, 13, "libnvinfer.so") == 0);
}

int collect(dl_phdr_info* info, size_t, void* paths) {
  if (info->dlpi_name != nullptr && is_tensorrt(info->dlpi_name)) {
    static_cast<std::vector<std::string>*>(paths)->emplace_back(info->dlpi_name);
  }
  return 0;
}

template <class Function>
Function* symbol(void* handle, char const* name) {
  return reinterpret_cast<Function*>(dlsym(handle, name));
}

std::string own_path() {
  Dl_info info = {};
  return dladdr(reinterpret_cast<void*>(&loaded_tensorrts), &info) != 0 && info.dli_fname != nullptr
             ? info.dli_fname
             : "libmoe_infer.so";
}

std::string headers_text() {
  return own_path() + " is built for TensorRT " + std::to_string(NV_TENSORRT_MAJOR) + " (headers " +
         std::to_string(NV_TENSORRT_MAJOR) + "." + std::to_string(NV_TENSORRT_MINOR) + "." +
         std::to_string(NV_TENSORRT_PATCH) + ")";
}

}  // namespace

std::string LoadedTensorRT::text() const {
  return "TensorRT " + std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch) + " (" + path +
         ")";
}

nvinfer1::IPluginRegistry* LoadedTensorRT::registry() const {
  auto* const get = symbol<nvinfer1::IPluginRegistry*()>(handle, "getPluginRegistry");
  return get == nullptr ? nullptr : get();
}

std::vector<LoadedTensorRT> loaded_tensorrts() {
  std::vector<std::string> paths;  // first all of them: dlopen must not be called while the loader walks its list
  dl_iterate_phdr(collect, &paths);
  std::vector<LoadedTensorRT> found;
  for (auto const& path : paths) {
    LoadedTensorRT loaded;
    loaded.path = path;
    // Never closed: the plugin registry outlives this library anyway.
    loaded.handle = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    auto* const get_version =
        loaded.handle == nullptr ? nullptr : symbol<int32_t()>(loaded.handle, "getInferLibVersion");
    if (get_version == nullptr) {
      continue;
    }
    int32_t const number = get_version();
    int32_t const thousand = number >= 10000 ? 10000 : 1000;  // from release 10 on
    loaded.major = number / thousand;
    loaded.minor = number % thousand / 100;
    loaded.patch = number % 100;
    found.push_back(loaded);
  }
  return found;
}

LoadedTensorRT matching_tensorrt() {
  auto const loaded = loaded_tensorrts();
  std::string others;
  for (auto const& tensorrt : loaded) {
    if (tensorrt.major == NV_TENSORRT_MAJOR) {
      return tensorrt;
    }
    others += (others.empty() ? "" : " and ") + tensorrt.text();
  }
  std::string const major = std::to_string(NV_TENSORRT_MAJOR);
  if (loaded.empty()) {
    throw invalid("moe_infer: no TensorRT is loaded in this process; " + headers_text() + ": load libnvinfer.so." +
                  major + " first (pip install 'moe-infer[gpu]' or LD_LIBRARY_PATH)");
  }
  throw invalid("moe_infer: this process has loaded " + others + ", but " + headers_text() +
                ", and a plugin works only with the major version it was built for; install TensorRT " + major +
                ", or build the library again with --tensorrt-prefix set to TensorRT " +
                std::to_string(loaded.front().major));
}

}  // namespace moe_infer
