// The two kernels of a fetch that the device drives (device_fetch.h).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/policy.h"
#include "fetch/fetch_tables.h"

namespace moe_infer {

// The experts that a call needs; device arrays. Either the rows of each expert, or the experts of each choice.
struct NeededExperts {
  int32_t const* counts = nullptr;   // (experts)
  int32_t const* choices = nullptr;  // (choice_count), if counts is null
  int32_t choice_count = 0;
};

// A part of an expert that a block copies at once.
struct FetchChunk {
  int32_t tensor;
  uint32_t bytes;
  uint64_t offset;         // in the tensor
  uint64_t offset_in_slot;
};

// How experts are copied; device arrays.
struct FetchSource {
  uint8_t const* const* tensors = nullptr;  // (experts, tensor_count): device addresses of page-locked host memory
  int32_t tensor_count = 0;
  FetchChunk const* chunks = nullptr;  // (chunk_count) of any expert
  int32_t chunk_count = 0;
  uint8_t* slots = nullptr;
  uint64_t slot_bytes = 0;
};

// One block. Plans the call as plan_call of policy.h does, where no more experts are needed than there are slots:
// brings the tables to the call's end, and lists the misses. `overlap`: core/launch.h.
void plan_fetch(PolicySettings const& settings, int32_t experts, int32_t slots, NeededExperts const& needed,
                FetchTables const& tables, bool overlap, cudaStream_t stream);

// `blocks` blocks. Copies what plan_fetch listed, expert after expert, and sets there[slot] when one has come. The
// kernel after it may start as soon as this one has, and must not wait for it (see grid_dependency.cuh).
void copy_experts(FetchSource const& source, FetchTables const& tables, unsigned blocks, bool overlap,
                  cudaStream_t stream);

}  // namespace moe_infer
