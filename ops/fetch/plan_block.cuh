// How one block plans a call on the device: plan_call of policy.h in parallel, for calls that need no more experts than
// there are slots. Then the slots that the misses take are those with the smallest keys, so all are chosen at once.
#pragma once

#include "core/layer_config.h"
#include "fetch/fetch_kernels.h"

namespace moe_infer {

struct PlanShared {
  uint64_t keys[kMaxExperts];    // of the slots
  int16_t missing[kMaxExperts];  // experts, in ascending order
  uint8_t is_needed[kMaxExperts];
  uint8_t is_missing[kMaxExperts];
  int32_t missing_count, needed_count, evicted_count;
};

// Smallest first: an empty slot, then the least worth keeping of those that the call does not need. Retention is far
// below 2^62 (policy.h).
__device__ inline uint64_t plan_key(uint64_t group, uint64_t worth) { return group << 62U | worth; }

// All threads of the block; `needed` is there.
template <int kThreads>
__device__ void plan_in_block(PolicySettings const& settings, int32_t experts, int32_t slots,
                              NeededExperts const& needed, FetchTables const& tables, PlanShared* shared) {
  constexpr int kLanes = 32;
  constexpr unsigned kAll = 0xffffffffU;
  auto const thread = static_cast<int32_t>(threadIdx.x);
  uint64_t const clock = *tables.clock + 1;
  for (int32_t e = thread; e < experts; e += kThreads) {
    shared->is_needed[e] = needed.counts != nullptr && needed.counts[e] > 0 ? 1 : 0;
    shared->is_missing[e] = 0;
  }
  if (thread == 0) {
    shared->needed_count = 0;
    shared->evicted_count = 0;
  }
  __syncthreads();
  if (needed.counts == nullptr) {
    for (int32_t i = thread; i < needed.choice_count; i += kThreads) shared->is_needed[needed.choices[i]] = 1;
    __syncthreads();
  }
  for (int32_t e = thread; e < experts; e += kThreads) {
    if (shared->is_needed[e] == 0) continue;
    bool const is_missing = tables.slot_of_expert[e] < 0;
    ExpertHistory history = tables.histories[e];
    record_use(settings, &history, clock);
    if (is_missing) history.fetched = static_cast<uint32_t>(clock);
    tables.histories[e] = history;
    ++tables.uses[e];
    shared->is_missing[e] = is_missing ? 1 : 0;
    atomicAdd(&shared->needed_count, 1);
  }
  __syncthreads();
  if (thread < kLanes) {
    int32_t before = 0;
    for (int32_t first = 0; first < experts; first += kLanes) {
      int32_t const e = first + thread;
      bool const is_missing = e < experts && shared->is_missing[e] != 0;
      unsigned const all = __ballot_sync(kAll, is_missing);
      if (is_missing) shared->missing[before + __popc(all & ((1U << thread) - 1U))] = static_cast<int16_t>(e);
      before += __popc(all);
    }
    if (thread == 0) shared->missing_count = before;
  }
  __syncthreads();
  int32_t const misses = shared->missing_count;
  if (misses > 0) {
    for (int32_t s = thread; s < slots; s += kThreads) {
      int32_t const expert = tables.expert_of_slot[s];
      bool const is_kept = expert >= 0 && shared->is_needed[expert] != 0;
      shared->keys[s] =
          expert < 0 ? 0 : plan_key(is_kept ? 2 : 1, retention(settings, tables.histories[expert], clock));
    }
    __syncthreads();
    for (int32_t s = thread; s < slots; s += kThreads) {
      uint64_t const key = shared->keys[s];
      int32_t rank = 0;
      for (int32_t other = 0; other < slots; ++other) {
        uint64_t const its = shared->keys[other];
        rank += its < key || (its == key && other < s) ? 1 : 0;
      }
      if (rank >= misses) continue;
      int32_t const expert = shared->missing[rank];
      int32_t const evicted = tables.expert_of_slot[s];
      if (evicted >= 0) {
        tables.slot_of_expert[evicted] = -1;
        atomicAdd(&shared->evicted_count, 1);
      }
      tables.expert_of_slot[s] = expert;
      tables.slot_of_expert[expert] = s;
      tables.there[s] = 0;
      tables.items[rank] = {expert, s};
      tables.chunks_done[rank] = 0;
    }
    __syncthreads();
  }
  if (thread == 0) {
    *tables.clock = clock;
    *tables.item_count = misses;
    tables.counters->hits += shared->needed_count - misses;
    tables.counters->misses += misses;
    tables.counters->evictions += shared->evicted_count;
  }
}

}  // namespace moe_infer
