// What a layer that fetches on the device keeps there: the tables of its cache, the list of what a call has to bring,
// and what was counted.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/policy.h"
#include "core/slices.h"

namespace moe_infer {

struct FetchItem {
  int32_t expert;
  int32_t slot;
};

struct FetchCounters {
  int64_t hits = 0;
  int64_t misses = 0;
  int64_t evictions = 0;
};

// Device arrays.
struct FetchTables {
  // The cache's tables (policy.h). They come first and side by side: the host copies them as one.
  uint64_t* clock = nullptr;           // (1)
  ExpertHistory* histories = nullptr;  // (experts)
  int32_t* slot_of_expert = nullptr;   // (experts)
  int32_t* expert_of_slot = nullptr;   // (slots)
  // The call.
  int32_t* item_count = nullptr;      // (1)
  FetchItem* items = nullptr;         // (slots)
  uint32_t* chunks_done = nullptr;    // (slots): of item i
  uint32_t* there = nullptr;          // (slots): 0 while the slot's expert is on its way
  FetchCounters* counters = nullptr;  // (1)
  int64_t* uses = nullptr;            // (experts): calls that needed it

  // The one place that sizes and slices this memory. `shared_bytes`: of the cache's tables.
  static size_t layout(int32_t experts, int32_t slots, uint8_t* base, FetchTables* tables, size_t* shared_bytes) {
    auto const e = static_cast<size_t>(experts);
    auto const s = static_cast<size_t>(slots);
    FetchTables t;
    Slices slices(base);
    t.clock = slices.take<uint64_t>(1);
    t.histories = slices.take<ExpertHistory>(e);
    t.slot_of_expert = slices.take<int32_t>(e);
    t.expert_of_slot = slices.take<int32_t>(s);
    *shared_bytes = slices.bytes();
    t.item_count = slices.take<int32_t>(1);
    t.items = slices.take<FetchItem>(s);
    t.chunks_done = slices.take<uint32_t>(s);
    t.there = slices.take<uint32_t>(s);
    t.counters = slices.take<FetchCounters>(1);
    t.uses = slices.take<int64_t>(e);
    *tables = t;
    return slices.bytes();
  }
};

}  // namespace moe_infer
