// Launches with attributes: clusters of blocks, and a start that overlaps the kernel before (grid_dependency.cuh).
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "core/cuda_check.h"

namespace moe_infer {

struct LaunchShape {
  unsigned blocks = 1;
  unsigned threads = 1;
  size_t shared_bytes = 0;
  unsigned cluster = 1;
  // The kernel waits by itself for the one before it in the stream, whosever that is.
  bool overlap = false;
  cudaStream_t stream = nullptr;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), LaunchShape const& shape, Arguments&&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = shape.cluster;
    attributes[count].val.clusterDim.y = 1;
    attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (shape.overlap) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.blocks, 1, 1);
  config.blockDim = dim3(shape.threads, 1, 1);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = shape.stream;
  config.attrs = attributes;
  config.numAttrs = count;
  MOE_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(static_cast<Arguments&&>(arguments))...));
}

}  // namespace moe_infer
