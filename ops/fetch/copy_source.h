// Where the copy engine finds the experts of a layer, and where it puts them.
#pragma once

#include <cstdint>
#include <vector>

namespace moe_infer {

// An expert is copied in parts: its tensors.
struct CopyPart {
  uint64_t offset_in_slot = 0;
  uint64_t bytes = 0;
  bool late = false;  // late ones come after the others
};

struct CopySource {
  std::vector<CopyPart> parts;         // late ones last
  std::vector<void const*> addresses;  // (experts, parts): page-locked memory
  uint8_t* slots = nullptr;
  uint64_t slot_bytes = 0;
  uint32_t* there = nullptr;  // of each slot
  uint64_t head_bytes = 0;    // of the first part of a call's first expert, which the kernel that plans copies

  uint64_t expert_bytes() const {
    uint64_t bytes = 0;
    for (auto const& part : parts) bytes += part.bytes;
    return bytes;
  }
  uint8_t const* address(int32_t expert, size_t part) const {
    return static_cast<uint8_t const*>(addresses[static_cast<size_t>(expert) * parts.size() + part]);
  }
  uint8_t* slot(int32_t number) const { return slots + static_cast<uint64_t>(number) * slot_bytes; }
};

}  // namespace moe_infer
