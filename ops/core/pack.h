// Weights on the device: from the type and row order of the file to those of a slot.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/data_type.h"

namespace moe_infer {

// A run of elements of one piece of an expert (see ExpertPiece): element i of the run is element `first` + i of the
// piece, whose row r is row first_row + r * row_stride of the packed tensor.
struct PackRun {
  int64_t first = 0;
  int64_t count = 0;
  int64_t columns = 0;
  int32_t first_row = 0;
  int32_t row_stride = 1;
};

// Writes the run at `source` (device, contiguous) to its places in the packed tensor at `tensor`.
void pack(void const* source, DataType source_dtype, void* tensor, DataType dtype, PackRun const& run,
          cudaStream_t stream);

}  // namespace moe_infer
