// How one block plans a call on the device: plan_call of policy.h in parallel, for calls that need no more experts than
// there are slots. Then the slots that the misses take are those with the smallest keys, so all are chosen at once.
#pragma once

#include "core/layer_config.h"
#include "fetch/arrivals.cuh"
#include "fetch/fetch_kernels.h"

namespace moe_infer {

// For up to kMost experts.
template <int kMost>
struct PlanShared {
  uint64_t keys[kMost];           // of the slots
  uint64_t worth[kMost];          // of keeping an expert that the call does not need
  int32_t slot_of_expert[kMost];  // of needed experts; pending while on its way
  int16_t missing[kMost];         // experts, in ascending order
  uint8_t is_needed[kMost];
  int32_t needed_count;
  int32_t evicted_count;
  int32_t guess;  // CopyOrders::guess
};

// Smallest first: an empty slot, then the least worth keeping of those that the call does not need. Retention is far
// below 2^62 (policy.h).
__device__ inline uint64_t plan_key(uint64_t group, uint64_t worth) { return group << 62U | worth; }

// One call:  BlockPlan<kThreads, kOwn> plan(...);  wait_for_previous_kernel();  plan.begin();  then the block fills
// shared->is_needed in;  __syncthreads();  plan.decide().
//
// The tables are asked for before the kernel before has ended: only kernels that plan write them, and between two plans
// of a layer there is always a kernel of this library that waits before it lets the next one start.
// kOwn: experts of a thread, and slots; kThreads * kOwn are at least the layer's experts.
template <int kThreads, int kOwn>
class BlockPlan {
 public:
  using Shared = PlanShared<kThreads * kOwn>;

  // Does all that does not depend on what is needed, while the kernel before still runs.
  __device__ BlockPlan(PolicySettings const& settings, int32_t experts, int32_t slots, FetchTables const& tables,
                       Shared* shared)
      : tables_(tables),
        shared_(shared),
        experts_(experts),
        slots_(slots),
        thread_(static_cast<int32_t>(threadIdx.x)),
        clock_(*tables.clock + 1) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      int32_t const e = i * kThreads + thread_;
      own_slots_[i] = e < experts ? tables.slot_of_expert[e] : 0;
      own_experts_[i] = e < slots ? tables.expert_of_slot[e] : -1;
      if (e >= experts) continue;
      used_[i] = tables.histories[e];
      uses_[i] = tables.uses[e];
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      int32_t const e = i * kThreads + thread_;
      if (e >= experts) break;
      shared->worth[e] = retention(settings, used_[i], clock_);
      record_use(settings, &used_[i], clock_);
    }
    if (thread_ == 0) {
      shared->needed_count = 0;
      shared->evicted_count = 0;
      shared->guess = -1;
      counters_ = *tables.counters;
      planned_ = *tables.planned;
    }
  }

  // When the kernel before is over.
  __device__ void begin() {
    if (thread_ == 0) last_wait_ = *tables_.arrivals.last_wait;
  }

  // All threads of the block. Afterwards shared->slot_of_expert is right for needed experts.
  __device__ void decide() {
    int32_t misses = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      int32_t const e = i * kThreads + thread_;
      bool const is_needed = e < experts_ && shared_->is_needed[e] != 0;
      bool const is_missing = is_needed && own_slots_[i] < 0;
      if (is_needed) {
        ExpertHistory history = used_[i];
        if (is_missing) history.fetched = static_cast<uint32_t>(clock_);
        tables_.histories[e] = history;
        tables_.uses[e] = uses_[i] + 1;
        shared_->slot_of_expert[e] = own_slots_[i];
      }
      unsigned const needed = __ballot_sync(kAllLanes, is_needed);
      if (needed != 0 && thread_ % kLanes == 0) atomicAdd(&shared_->needed_count, __popc(needed));
      misses += __syncthreads_count(is_missing);
    }
    if (misses > 0) place(misses);
    if (thread_ == 0) {
      *tables_.item_count = misses;
      if (tables_.orders.number != nullptr) order(misses);
      finish(shared_->needed_count, misses);
    }
  }

 private:
  static constexpr int kLanes = 32;
  static constexpr unsigned kAllLanes = 0xffffffffU;
  static constexpr float kNewest = 1.0F / 16;  // of a call, among those that recent_misses tells of

  // Chooses slots for what is missing, and says what has to be copied.
  __device__ void place(int32_t misses) {
    list_missing();
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      int32_t const s = i * kThreads + thread_;
      if (s >= slots_) break;
      int32_t const expert = own_experts_[i];
      // No slot of an expert that the call needs is taken, whatever it is worth.
      bool const is_kept = expert >= 0 && shared_->is_needed[expert] != 0;
      shared_->keys[s] = expert < 0 ? 0 : plan_key(is_kept ? 2 : 1, shared_->worth[expert]);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      int32_t const s = i * kThreads + thread_;
      if (s >= slots_) break;
      uint64_t const key = shared_->keys[s];
      int32_t rank = 0;
      for (int32_t other = 0; other < slots_; ++other) {
        uint64_t const its = shared_->keys[other];
        rank += its < key || (its == key && other < s) ? 1 : 0;
      }
      if (rank < misses) fill(s, own_experts_[i], rank);
    }
    __syncthreads();
  }

  __device__ void list_missing() {
    if (thread_ >= kLanes) return;
    int32_t before = 0;
    for (int32_t first = 0; first < experts_; first += kLanes) {
      int32_t const e = first + thread_;
      bool const is_missing = e < experts_ && shared_->is_needed[e] != 0 && shared_->slot_of_expert[e] < 0;
      unsigned const all = __ballot_sync(kAllLanes, is_missing);
      if (is_missing) shared_->missing[before + __popc(all & ((1U << thread_) - 1U))] = static_cast<int16_t>(e);
      before += __popc(all);
    }
  }

  // Slot s, of `evicted` (-1: empty), is for the rank-th of the missing experts.
  __device__ void fill(int32_t s, int32_t evicted, int32_t rank) {
    int32_t const expert = shared_->missing[rank];
    if (evicted >= 0) {
      tables_.slot_of_expert[evicted] = -1;
      atomicAdd(&shared_->evicted_count, 1);
    }
    tables_.expert_of_slot[s] = expert;
    tables_.slot_of_expert[expert] = s;
    shared_->slot_of_expert[expert] = pending(s);
    tables_.arrivals.there[s] = kNotThere;
    tables_.items[rank] = {expert, s};
    tables_.chunks_done[rank] = 0;
    if (tables_.orders.number != nullptr) {
      tables_.orders.items[rank] = {expert, s};
      __threadfence_system();  // before the number, and the flag goes down before it goes up
    }
  }

  __device__ void order(int32_t misses) {
    store_release(tables_.listed, tables_.orders.wanted);
    *tables_.orders.count = misses;
    *tables_.orders.guess = shared_->guess;
    __threadfence_system();
    store_release_to_host(tables_.orders.number, tables_.orders.wanted);
  }

  __device__ void finish(int32_t needed, int32_t misses) {
    *tables_.clock = clock_;
    counters_.hits += needed - misses;
    counters_.misses += misses;
    counters_.evictions += shared_->evicted_count;
    counters_.recent_misses += (static_cast<float>(misses) - counters_.recent_misses) * kNewest;
    if (clock_ % kPublishedCalls == 0) *tables_.recent_misses = counters_.recent_misses;
    if (last_wait_ != 0) {
      counters_.stall_ns += static_cast<int64_t>(last_wait_ - planned_);
      *tables_.arrivals.last_wait = 0;
    }
    *tables_.counters = counters_;
    if (misses > 0) *tables_.planned = nanoseconds();
  }

  FetchTables const& tables_;
  Shared* shared_;
  int32_t experts_, slots_, thread_;
  uint64_t clock_;
  ExpertHistory used_[kOwn];   // own experts' histories if the call needs them
  int64_t uses_[kOwn];         // of own experts so far
  int32_t own_slots_[kOwn];    // of own experts
  int32_t own_experts_[kOwn];  // in own slots
  // Of thread 0.
  FetchCounters counters_;
  uint64_t last_wait_ = 0, planned_ = 0;
};

}  // namespace moe_infer
