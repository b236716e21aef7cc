// A weight file's index, validated before any byte of weights is used. The file is untrusted input.
//
// Two formats behind one interface: safetensors (safetensors_file.cpp) and npz (npz_file.cpp).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/data_type.h"

namespace moe_infer {

// Resolves a path as the operator does: absolute as it is; relative against MOE_INFER_WEIGHT_DIR, then the working
// directory. Throws Error(MOE_INFER_FILE) that lists what was tried.
std::string resolve_weight_path(std::string const& path);

struct TensorEntry {
  DataType dtype = DataType::kFloat32;
  std::vector<int64_t> shape;
  uint64_t offset = 0;      // of the data in the file; for a deflated npz member, of the compressed data
  uint64_t bytes = 0;       // of the tensor once inflated
  uint64_t compressed = 0;  // bytes in the file when deflated; 0: stored, the data can be used in place
  uint64_t header = 0;      // deflated npz members: bytes of the .npy header before the data once inflated
};

class WeightFile {
 public:
  // Maps the file read-only and checks its index. Throws Error(MOE_INFER_FILE).
  static std::shared_ptr<WeightFile> open(std::string const& path);
  virtual ~WeightFile();

  std::string const& path() const { return path_; }
  std::map<std::string, TensorEntry> const& tensors() const { return tensors_; }
  // crc32 (zlib) of the bytes that make up the index and the file's size: 8 hexadecimal digits, '-', decimal size.
  // The index is: safetensors, the JSON header; npz, the central directory (which holds each member's CRC).
  std::string const& digest() const { return digest_; }
  // True while the file on disk is still the one that was mapped (device, inode, size, modification time).
  bool unchanged() const;
  uint8_t const* data() const { return data_; }
  uint64_t size() const { return size_; }
  // Inflates a deflated entry into `out` (entry.bytes). Throws when its real size or CRC differs.
  virtual void inflate(TensorEntry const& entry, void* out) const = 0;

 protected:
  std::string path_, digest_;
  std::map<std::string, TensorEntry> tensors_;
  uint8_t const* data_ = nullptr;
  uint64_t size_ = 0;
};

}  // namespace moe_infer
