// The index of a zip archive: its central directory and the local headers, read strictly (PKWARE's APPNOTE.TXT, 4.3 to
// 4.5). One archive in one file, stored or deflated members, zip64 included.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/weight_file.h"

namespace moe_infer {

struct ZipMember {
  std::string name;
  bool deflated = false;
  uint32_t crc = 0;
  uint64_t compressed = 0;     // bytes in the file
  uint64_t size = 0;           // bytes once inflated
  uint64_t header_offset = 0;  // of the local header
  uint64_t offset = 0;         // of the (compressed) data
};

struct ZipIndex {
  std::vector<ZipMember> members;
  std::vector<uint8_t> directory;  // the central directory's bytes
};

// Throws Error(MOE_INFER_FILE): no archive, damaged, or a member is encrypted, twice there, outside the file, over
// another, or described differently by its local header.
ZipIndex read_zip_index(WeightFile const& file);

}  // namespace moe_infer
