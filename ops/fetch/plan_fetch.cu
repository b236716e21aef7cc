#include "core/grid_dependency.cuh"
#include "core/launch.h"
#include "core/layer_config.h"
#include "fetch/fetch_kernels.h"

namespace moe_infer {
namespace {

constexpr int kLanes = 32;
constexpr int kThreads = 512;
constexpr unsigned kAll = 0xffffffffU;

// Smallest first: an empty slot, then the least worth keeping of those that the call does not need. Retention is far
// below 2^62 (policy.h).
__device__ uint64_t key_of(uint64_t group, uint64_t worth) { return group << 62U | worth; }

__global__ void __launch_bounds__(kThreads)
    plan_kernel(PolicySettings const settings, int32_t const experts, int32_t const slots, NeededExperts const needed,
                FetchTables const tables) {
  __shared__ uint8_t is_needed[kMaxExperts];
  __shared__ int16_t missing[kMaxExperts];  // in ascending order
  __shared__ uint64_t keys[kMaxExperts];    // of the slots
  __shared__ int32_t missing_count, needed_count, evicted_count;
  auto const thread = static_cast<int32_t>(threadIdx.x);
  for (int32_t e = thread; e < experts; e += kThreads) is_needed[e] = 0;
  if (thread == 0) {
    needed_count = 0;
    evicted_count = 0;
  }
  __syncthreads();
  wait_for_previous_kernel();
  start_next_kernel();
  uint64_t const clock = *tables.clock + 1;
  if (needed.counts != nullptr) {
    for (int32_t e = thread; e < experts; e += kThreads) is_needed[e] = needed.counts[e] > 0;
  } else {
    for (int32_t i = thread; i < needed.choice_count; i += kThreads) is_needed[needed.choices[i]] = 1;
  }
  __syncthreads();
  for (int32_t e = thread; e < experts; e += kThreads) {
    if (is_needed[e] == 0) continue;
    ExpertHistory history = tables.histories[e];
    record_use(settings, &history, clock);
    if (tables.slot_of_expert[e] < 0) history.fetched = static_cast<uint32_t>(clock);
    tables.histories[e] = history;
    ++tables.uses[e];
    atomicAdd(&needed_count, 1);
  }
  if (thread < kLanes) {
    int32_t before = 0;
    for (int32_t first = 0; first < experts; first += kLanes) {
      int32_t const e = first + thread;
      bool const is_missing = e < experts && is_needed[e] != 0 && tables.slot_of_expert[e] < 0;
      unsigned const all = __ballot_sync(kAll, is_missing);
      if (is_missing) missing[before + __popc(all & ((1U << thread) - 1U))] = static_cast<int16_t>(e);
      before += __popc(all);
    }
    if (thread == 0) missing_count = before;
  }
  __syncthreads();
  int32_t const misses = missing_count;
  if (misses > 0) {
    for (int32_t s = thread; s < slots; s += kThreads) {
      int32_t const expert = tables.expert_of_slot[s];
      bool const is_kept = expert >= 0 && is_needed[expert] != 0;
      keys[s] = expert < 0 ? 0 : key_of(is_kept ? 2 : 1, retention(settings, tables.histories[expert], clock));
    }
    __syncthreads();
    for (int32_t s = thread; s < slots; s += kThreads) {
      uint64_t const key = keys[s];
      int32_t rank = 0;
      for (int32_t other = 0; other < slots; ++other) {
        rank += keys[other] < key || (keys[other] == key && other < s) ? 1 : 0;
      }
      if (rank >= misses) continue;
      int32_t const expert = missing[rank];
      int32_t const evicted = tables.expert_of_slot[s];
      if (evicted >= 0) {
        tables.slot_of_expert[evicted] = -1;
        atomicAdd(&evicted_count, 1);
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
    tables.counters->hits += needed_count - misses;
    tables.counters->misses += misses;
    tables.counters->evictions += evicted_count;
  }
}

}  // namespace

void plan_fetch(PolicySettings const& settings, int32_t experts, int32_t slots, NeededExperts const& needed,
                FetchTables const& tables, bool overlap, cudaStream_t stream) {
  LaunchShape shape;
  shape.threads = kThreads;
  shape.overlap = overlap;
  shape.stream = stream;
  launch(&plan_kernel, shape, settings, experts, slots, needed, tables);
}

}  // namespace moe_infer
