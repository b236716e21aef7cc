// ops/core/use_history.cpp from Python: the counts of one cache in and out of a file.
#include "core/use_history.h"

#include <cstring>
#include <vector>

#include "core/policy_settings.h"

using namespace moe_infer;

// With `read`, clock, counts and last uses are filled; otherwise they are written after a load, as a cache does. `note`
// has room for 4,096 bytes.
extern "C" void exchange(char const* path, char const* digest, char const* prefix, char const* policy, int32_t experts,
                         int32_t read, uint64_t* clock, uint32_t* counts, uint64_t* last_uses, char* note) {
  auto const settings = parse_policy(policy, "policy");
  std::vector<ExpertHistory> histories(static_cast<size_t>(experts));
  CacheTables tables;
  tables.expert_count = experts;
  tables.histories = histories.data();
  UseHistoryFile file(path, digest, prefix, settings);
  file.load(&tables);
  if (read == 0) {
    tables.clock = *clock;
  }
  *clock = tables.clock;
  for (size_t i = 0; i < histories.size(); ++i) {
    if (read == 0) {
      histories[i].count = counts[i];
      histories[i].last_use = last_uses[i];
    }
    counts[i] = histories[i].count;
    last_uses[i] = histories[i].last_use;
  }
  if (read == 0) {
    file.save(tables);
  }
  std::strncpy(note, file.note().c_str(), 4095);
}
