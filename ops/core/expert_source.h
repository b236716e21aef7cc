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
  // Whether the address lies where the file is mapped, detached pages included.
  bool is_mapped(void const* data) const;
  // Replaces pages of the mapped file by memory of the process with the same content, at the same addresses.
  // Page-locking the pages of a file itself makes the kernel move them first, and with pages that were just written
  // that was seen never to end. Others may be reading the pages meanwhile. Throws Error(MOE_INFER_FILE or
  // MOE_INFER_INTERNAL).
  void detach_from_file(HostRange const& pages);
  PinnedRanges& pinned() { return pinned_; }

 private:
  std::shared_ptr<WeightFile> file_;
  mutable std::mutex mutex_;
  std::vector<std::unique_ptr<HostPages>> pages_;
  std::map<std::string, uint8_t const*> inflated_;
  PinnedRanges pinned_;  // after what it locks: unlocked before that is unmapped
};

}  // namespace moe_infer
