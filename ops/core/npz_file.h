// npz: a zip archive of .npy arrays, stored or deflated.
#pragma once

#include <string>

#include "core/weight_file.h"
#include "core/zip_index.h"

namespace moe_infer {

class NpzFile : public WeightFile {
 public:
  // Reads the directory and each member's .npy header; of a deflated member only as much is inflated.
  explicit NpzFile(std::string const& path);
  void inflate(TensorEntry const& entry, void* out) const override;
  void check_crc(TensorEntry const& entry, uint32_t crc) const override;

 private:
  TensorEntry describe(ZipMember const& member) const;
  std::vector<uint8_t> read_start(ZipMember const& member, uint64_t bytes) const;
  std::string name_of_entry(TensorEntry const& entry) const;
};

}  // namespace moe_infer
