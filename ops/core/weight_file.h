// A weight file's index, validated before any byte of weights is used. The file is untrusted input.
//
// Two formats behind one interface: safetensors (safetensors_file.cpp) and npz (npz_file.cpp, which reads the archive
// with zip_index.cpp and each array's header with npy_header.cpp). Both check with file_index.cpp. The index and
// deflated data are read with pread, so a file that shrinks meanwhile gives an error. Stored weights are used where
// they are mapped: writers must replace a file by renaming, as moe_infer does; shortening a mapped file in place makes
// the kernel end the process that reads it (SIGBUS), which unchanged() makes unlikely and nothing rules out.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <tuple>
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
  uint32_t crc = 0;         // deflated npz members: of header and data
};

// What tells one file from another: device, inode, size, modification time in ns.
using FileIdentity = std::tuple<uint64_t, uint64_t, uint64_t, int64_t>;

// Identity of the file at `path`; false where there is none.
bool find_identity(std::string const& path, FileIdentity* identity);

class WeightFile {
 public:
  // Maps the file read-only and checks its index. Throws Error(MOE_INFER_FILE).
  static std::shared_ptr<WeightFile> open(std::string const& path);
  virtual ~WeightFile();
  WeightFile(WeightFile const&) = delete;
  WeightFile& operator=(WeightFile const&) = delete;

  std::string const& path() const { return path_; }
  std::map<std::string, TensorEntry> const& tensors() const { return tensors_; }
  // crc32 (zlib) of the bytes that make up the index and the file's size: 8 hexadecimal digits, '-', decimal size.
  // The index is: safetensors, the JSON header; npz, the central directory (which holds each member's CRC).
  std::string const& digest() const { return digest_; }
  FileIdentity const& identity() const { return identity_; }
  // True while the file on disk is still the one that was mapped (device, inode, size, modification time).
  bool unchanged() const;
  // Neither format aligns its data: copy from here with memcpy.
  uint8_t const* data() const { return data_; }
  uint64_t size() const { return size_; }
  // Copies bytes of the file without touching the mapping. Throws when the file has shrunk.
  void read_at(uint64_t offset, void* out, uint64_t bytes) const;
  // Inflates a deflated entry into `out` (entry.bytes). Throws when its real size or CRC differs. Thread-safe.
  virtual void inflate(TensorEntry const& entry, void* out) const = 0;

 protected:
  explicit WeightFile(std::string const& path);  // maps
  void set_digest(uint8_t const* index, uint64_t bytes);

  std::string path_, digest_;
  std::map<std::string, TensorEntry> tensors_;
  uint8_t const* data_ = nullptr;
  uint64_t size_ = 0;

 private:
  class Descriptor {
   public:
    explicit Descriptor(std::string const& path);
    ~Descriptor();
    Descriptor(Descriptor const&) = delete;
    Descriptor& operator=(Descriptor const&) = delete;
    int number() const { return number_; }

   private:
    int number_ = -1;
  };
  Descriptor descriptor_;
  FileIdentity identity_;
};

}  // namespace moe_infer
