// The TensorRT that this process has loaded. The library does not link libnvinfer, so that one build serves every
// release of the headers' major version; it takes the few functions it needs from the loaded one.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

namespace moe_infer {

struct LoadedTensorRT {
  std::string path;
  void* handle = nullptr;
  int32_t major = 0, minor = 0, patch = 0;

  std::string text() const;  // "TensorRT 10.6.0 (PATH)"
  nvinfer1::IPluginRegistry* registry() const;
};

// Every libnvinfer in the process, whatever scope it was loaded in.
std::vector<LoadedTensorRT> loaded_tensorrts();

// The one of the headers' major version. Throws Error(MOE_INFER_INVALID) that names what was found and the remedy.
LoadedTensorRT matching_tensorrt();

}  // namespace moe_infer
