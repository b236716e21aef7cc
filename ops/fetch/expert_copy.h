// What blocks need to copy the experts that a call fetches.
#pragma once

#include <cstdint>

#include "fetch/fetch_tables.h"

namespace moe_infer {

// Of every chunk but the last of each tensor: four times what a warp has in flight (copy_block.cuh).
constexpr uint64_t kChunkBytes = uint64_t{16} << 10U;

// A part of an expert that a warp copies.
struct FetchChunk {
  int32_t tensor;
  uint32_t bytes;
  bool late;        // its tensor is needed late (ExpertTensor::late)
  uint64_t offset;  // in the tensor
  uint64_t offset_in_slot;
};

// Device arrays.
struct FetchSource {
  uint8_t const* const* tensors = nullptr;  // (experts, tensor_count): device addresses of page-locked host memory
  int32_t tensor_count = 0;
  FetchChunk const* chunks = nullptr;  // (chunk_count) of any expert
  int32_t chunk_count = 0;
  int32_t late_count = 0;  // of these: the last ones
  uint8_t* slots = nullptr;
  uint64_t slot_bytes = 0;
};

struct ExpertCopy {
  FetchSource source;
  FetchTables tables;
  uint32_t blocks = 0;       // that copy; 0: kernels copy nothing
  uint32_t head_chunks = 0;  // that copy_head_in_block copies, the first ones of an expert
};

}  // namespace moe_infer
