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
  int64_t stall_ns = 0;     // of calls before the last one
  float recent_misses = 0;  // of a call, averaged; the last ones count most
};

// Values of a slot's flag; larger ones say the same as kAllThere.
constexpr uint32_t kNotThere = 0;
constexpr uint32_t kFirstThere = 1;  // all but the tensors that are needed late (ExpertTensor::late)
constexpr uint32_t kAllThere = 2;

// Device arrays: which experts have come while kernels run (arrivals.cuh).
struct Arrivals {
  uint32_t* there = nullptr;      // (slots); null: nothing is on its way
  uint64_t* last_wait = nullptr;  // (1) when somebody waited last in this call, in the device's nanoseconds; 0: nobody
};

// What a call orders from the host (host_copy.h), in page-locked memory. The number is written last; the host says
// which it will be, so that it takes no orders of a call that it gave up.
struct CopyOrders {
  uint32_t* number = nullptr;  // (1); null: kernels copy, and nothing is ordered
  int32_t* count = nullptr;    // (1)
  FetchItem* items = nullptr;  // (slots)
  int32_t* guess = nullptr;    // (1) an expert that the layer that runs next may miss (guess.h), -1: none
  uint32_t wanted = 0;         // the number of this call
};

// In place of a slot's number while its expert is on its way.
MOE_HOST_DEVICE inline int32_t pending(int32_t slot) { return ~slot; }
constexpr int32_t kMostPlannedChoices = 64;
// A write to the host takes a kernel more than a microsecond.
constexpr uint64_t kPublishedCalls = 16;

// Device arrays.
struct FetchTables {
  // The cache's tables (policy.h). They come first and side by side: the host copies them as one.
  uint64_t* clock = nullptr;           // (1)
  ExpertHistory* histories = nullptr;  // (experts)
  int32_t* slot_of_expert = nullptr;   // (experts)
  int32_t* expert_of_slot = nullptr;   // (slots)
  // The call.
  int32_t* item_count = nullptr;    // (1)
  FetchItem* items = nullptr;       // (slots)
  uint32_t* listed = nullptr;       // (1) orders.wanted of the last call whose items stand
  uint64_t* chunks_done = nullptr;  // (slots): of item i, those that are needed late counted in the upper half
  Arrivals arrivals;
  uint64_t* planned = nullptr;        // (1) when the last call that misses something was planned; as last_wait
  int32_t* slot_of_choice = nullptr;  // (kMostPlannedChoices) of a single token; pending(slot) while on its way
  FetchCounters* counters = nullptr;  // (1)
  int64_t* uses = nullptr;            // (experts): calls that needed it
  // Elsewhere.
  CopyOrders orders;
  float* recent_misses = nullptr;  // (1), page-locked: FetchCounters::recent_misses, of every kPublishedCalls-th call

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
    t.listed = slices.take<uint32_t>(1);
    t.chunks_done = slices.take<uint64_t>(s);
    t.arrivals.there = slices.take<uint32_t>(s);
    t.arrivals.last_wait = slices.take<uint64_t>(1);
    t.planned = slices.take<uint64_t>(1);
    t.slot_of_choice = slices.take<int32_t>(static_cast<size_t>(kMostPlannedChoices));
    t.counters = slices.take<FetchCounters>(1);
    t.uses = slices.take<int64_t>(e);
    *tables = t;
    return slices.bytes();
  }
};

}  // namespace moe_infer
