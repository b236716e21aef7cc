// What caches remember of their experts, kept in a file for the next process: MOE_INFER_STATISTICS_FILE.
//
// Text, a line for each cache: digest of the weight file, prefix, policy, number of experts, clock, then count and last
// use of each expert. The file is not trusted: what is damaged is not used, and a file of something else is neither
// read nor replaced. Processes that write at once do not damage it; the last one keeps its caches' lines and those it
// read.
#pragma once

#include <cstdint>
#include <string>

#include "core/policy.h"

namespace moe_infer {

class UseHistoryFile {
 public:
  // `path` empty: nothing is read or written. `digest` and `prefix` say whose experts they are.
  UseHistoryFile(std::string path, std::string const& digest, std::string const& prefix,
                 PolicySettings const& settings);
  // With the path that MOE_INFER_STATISTICS_FILE says.
  static std::string path_from_environment();

  // Fills clock and histories of an empty cache, if the file has them. Never throws for what is in the file.
  void load(CacheTables* tables);
  // Writes them, to a temporary file that takes the name when it is whole. Nothing happens when the cache had no call
  // since load, or the name belongs to a file of something else. Never throws.
  void save(CacheTables const& tables) noexcept;

  // Why the file is not used, as a sentence; "" if it is, or if there is none to use.
  std::string const& note() const { return note_; }

 private:
  std::string path_, key_;
  PolicySettings settings_;
  uint64_t loaded_clock_ = 0;
  std::string note_;
};

}  // namespace moe_infer
