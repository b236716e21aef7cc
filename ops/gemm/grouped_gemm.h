// One matrix product for each group of rows, against the weights of the group's expert:
//
//   output[rows of g] = act(input[rows of g] @ W_g^T + bias_g) + source[rows of g],  W_g (n, k) row-major in the slot
//   of g
//
// with a bias or a source or neither, and an activation or none.
// Sums are in float32; those of float32 products are taken in slices of k (simt_kernel.cuh). How many rows a group has
// is known to the device alone; groups without rows cost nothing. Which kernel runs depends on what the host knows of
// the whole call (rows, expert_count, n, k, type, alignment), and a tile's result on its group alone: so it does not
// matter which experts share a call, and resident and streaming results agree in every bit. docs/kernels.md says which
// kernel runs when.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/data_type.h"
#include "gemm/activation.cuh"
#include "sublayers/sub_layer.h"

namespace moe_infer {

struct GroupedGemm {
  DataType dtype = DataType::kFloat32;
  ExpertGroups groups;       // ascending in their rows, as route/ makes them
  int64_t rows = 0;          // of input and output: SubLayerCall::rows
  int32_t expert_count = 0;  // SubLayerCall::expert_count
  int64_t n = 0;
  int64_t k = 0;
  uint64_t weight_offset = 0;  // of W in a slot
  void const* input = nullptr;
  int64_t input_stride = 0;  // elements from a row to the next, at least k
  bool has_bias = false;
  uint64_t bias_offset = 0;      // of the bias (n) in a slot
  void const* source = nullptr;  // (rows, n), added before rounding; nullptr: none. Not with bias or activation
  void* output = nullptr;        // (rows, n); with a gated activation (rows, n / 2)
  Activation activation;
  int32_t* counters = nullptr;  // two, zero before and after (device); nullptr: without the kernels that need them
  bool overlap = false;         // start while the previous kernel still runs (core/launch.h)
  bool after_fetch = false;     // the previous kernel copies the experts: see ExpertGroups::arrivals
  void* workspace = nullptr;    // grouped_gemm_workspace(groups.count) bytes, 256-byte aligned. Calls on one stream may
                                // share it; each call writes it before it reads it
  cudaStream_t stream = nullptr;
};

// Bytes of workspace for up to `groups` groups.
size_t grouped_gemm_workspace(int32_t groups);

// Enqueues the products. Neither synchronises nor allocates. Throws Error(MOE_INFER_INVALID) when a size is beyond what
// the kernels count in 32 bits.
void grouped_gemm(GroupedGemm const& gemm);

}  // namespace moe_infer
