// One weight file in host memory, shared by every layer and session of the process that uses it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "core/host_memory.h"
#include "core/weight_file.h"

namespace moe_infer {

class ExpertSource {
 public:
  // The source of the file at `path`: the one that the process has while the file is the same, else a new one.
  static std::shared_ptr<ExpertSource> open(std::string const& path);
  explicit ExpertSource(std::shared_ptr<WeightFile> file) : file_(std::move(file)), reserved_(file_->size()) {}

  WeightFile const& file() const { return *file_; }
  // Where the tensor's bytes are in memory: of a stored one only while they are page-locked (pinned()), of a deflated
  // one once it is inflated, and null before.
  uint8_t const* find(std::string const& name) const;
  // Inflates those of the tensors that are deflated and were not inflated yet.
  void inflate(std::vector<std::string> const& names);
  // The addresses that stand for the bytes of the file, whether there is memory behind them or not.
  HostRange file_range() const;
  bool is_in_file(void const* data) const { return reserved_.contains(data); }
  PinnedRanges& pinned() { return pinned_; }
  // Reads pages of file_range() into memory of the process and locks it. A mapping of the file would need no copy, but
  // to page-lock it the kernel moves the file's pages first, which was seen never to end with pages that were just
  // written. Returns as PinnedRanges::pin; throws Error(MOE_INFER_FILE or MOE_INFER_INTERNAL).
  bool pin_file_pages(HostRange const& pages);

  // Checks what the environment asks for (content_check.h) of those of the tensors that were not checked yet. `names`:
  // in the order in which the first bad one is told.
  void check_content(std::vector<std::string> const& names, bool stacked);

 private:
  std::shared_ptr<WeightFile> file_;
  mutable std::mutex mutex_;
  std::vector<std::unique_ptr<HostPages>> pages_;
  std::map<std::string, uint8_t const*> inflated_;
  ReservedPages reserved_;
  std::mutex checking_;
  std::set<std::string> checked_;
  PinnedRanges pinned_;  // after what it locks: unlocked before that is unmapped
};

}  // namespace moe_infer
