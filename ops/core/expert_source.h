// One weight file in host memory, shared by every layer and session of the process that uses it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/host_memory.h"
#include "core/weight_file.h"

namespace moe_infer {

class ExpertSource {
 public:
  // The source of the file at `path`: the one that the process has while the file is the same, else a new one.
  static std::shared_ptr<ExpertSource> open(std::string const& path);
  explicit ExpertSource(std::shared_ptr<WeightFile> file) : file_(std::move(file)) {}

  WeightFile const& file() const { return *file_; }
  // Where the tensor's bytes are; null while a deflated one was not inflated.
  uint8_t const* find(std::string const& name) const;
  // Inflates those of the tensors that are deflated and were not inflated yet.
  void inflate(std::vector<std::string> const& names);
  // Whether the address lies in the mapped file, which cannot be written.
  bool is_mapped(void const* data) const;
  PinnedRanges& pinned() { return pinned_; }

 private:
  std::shared_ptr<WeightFile> file_;
  mutable std::mutex mutex_;
  std::vector<std::unique_ptr<HostPages>> pages_;
  std::map<std::string, uint8_t const*> inflated_;
  PinnedRanges pinned_;  // after what it locks: unlocked before that is unmapped
};

}  // namespace moe_infer
