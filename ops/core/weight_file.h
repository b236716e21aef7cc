// A weight file's index, validated before any byte of weights is used. The file is untrusted input.
//
// Two formats behind one interface: safetensors (safetensors_file.cpp) and npz (npz_file.cpp, which reads the archive
// with zip_index.cpp and each array's header with npy_header.cpp). Both check with file_index.cpp. The file is read
// with pread and never mapped: one that shrinks while it is in use gives an error, where reading a mapping would end
// the process (SIGBUS).
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
  uint64_t compressed = 0;  // bytes in the file when deflated; 0: stored, the data are there as they are
  uint64_t header = 0;      // npz: bytes of the .npy header before the data, in the file or once inflated
  uint32_t crc = 0;         // npz: of header and data
};

// What tells one file from another: device, inode, size, modification time in ns.
using FileIdentity = std::tuple<uint64_t, uint64_t, uint64_t, int64_t>;

// Identity of the file at `path`; false where there is none.
bool find_identity(std::string const& path, FileIdentity* identity);

class WeightFile {
 public:
  // Opens the file and checks its index. Throws Error(MOE_INFER_FILE).
  static std::shared_ptr<WeightFile> open(std::string const& path);
  virtual ~WeightFile() = default;
  WeightFile(WeightFile const&) = delete;
  WeightFile& operator=(WeightFile const&) = delete;

  std::string const& path() const { return path_; }
  std::map<std::string, TensorEntry> const& tensors() const { return tensors_; }
  // crc32 (zlib) of the bytes that make up the index and the file's size: 8 hexadecimal digits, '-', decimal size.
  // The index is: safetensors, the JSON header; npz, the central directory (which holds each member's CRC).
  std::string const& digest() const { return digest_; }
  FileIdentity const& identity() const { return identity_; }
  // True while the file on disk is still the one that was opened (device, inode, size, modification time).
  bool unchanged() const;
  uint64_t size() const { return size_; }
  // Copies bytes of the file. Throws when it has shrunk. Thread-safe.
  void read_at(uint64_t offset, void* out, uint64_t bytes) const;
  // Inflates a deflated entry into `out` (entry.bytes). Throws when its real size or CRC differs. Thread-safe.
  virtual void inflate(TensorEntry const& entry, void* out) const = 0;
  // Compares the CRC of a stored entry, header included, with the one in the file. Throws when it differs.
  virtual void check_crc(TensorEntry const& entry, uint32_t crc) const;

 protected:
  explicit WeightFile(std::string const& path);
  void set_digest(uint8_t const* index, uint64_t bytes);

  std::string path_, digest_;
  std::map<std::string, TensorEntry> tensors_;
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
