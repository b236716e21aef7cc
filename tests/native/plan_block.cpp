// ops/fetch/plan_block.cuh on the host, its threads taking turns, beside plan_call of policy.h: call by call both must
// decide the same and leave the same tables.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "warp.h"

namespace {

struct ThreadIndex {
  unsigned x;
};

}  // namespace

#define threadIdx (ThreadIndex{static_cast<unsigned>(turns.thread())})

inline void __syncthreads() { turns.operate(); }
inline void __threadfence_system() {}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

constexpr int kThreads = 256;

// None says its next before all have read.
inline int __syncthreads_count(bool value) {
  static std::array<bool, kThreads> said;
  said[turns.thread()] = value;
  turns.operate();
  auto const count = static_cast<int>(std::count(said.begin(), said.end(), true));
  turns.operate();
  return count;
}

template <class T>
T atomicAdd(T* address, T value) {
  T const old = *address;
  *address += value;
  return old;
}

#include "fetch/plan_block.cuh"

namespace {

using moe_infer::CacheTables;
using moe_infer::ExpertHistory;
using moe_infer::FetchTables;
using moe_infer::PlannedExpert;
using moe_infer::PolicySettings;

// What the threads of a call are given.
struct Call {
  PolicySettings settings;
  int32_t experts;
  int32_t slots;
  FetchTables tables;
  int32_t const* counts;
  void* shared;
} call;

template <int kOwn>
void run_thread() {
  using Plan = moe_infer::BlockPlan<kThreads, kOwn>;
  auto& shared = *static_cast<typename Plan::Shared*>(call.shared);
  Plan plan(call.settings, call.experts, call.slots, call.tables, &shared);
  plan.begin();
  for (auto e = static_cast<int32_t>(threadIdx.x); e < call.experts; e += kThreads) {
    shared.is_needed[e] = call.counts[e] > 0 ? 1 : 0;
  }
  __syncthreads();
  plan.decide();
}

// Both ways to plan, and the tables of each.
class Caches {
 public:
  Caches(PolicySettings const& settings, int32_t experts, int32_t slots, bool orders)
      : slot_of_expert_(static_cast<size_t>(experts), -1),
        expert_of_slot_(static_cast<size_t>(slots), -1),
        histories_(static_cast<size_t>(experts)),
        expected_{experts, slots, slot_of_expert_.data(), expert_of_slot_.data(), histories_.data(), 0},
        plan_(static_cast<size_t>(experts)),
        uses_(static_cast<size_t>(experts), 0),
        ordered_(static_cast<size_t>(slots)),
        has_orders_(orders) {
    size_t shared_bytes = 0;
    FetchTables tables;
    memory_.resize((FetchTables::layout(experts, slots, nullptr, &tables, &shared_bytes) + 7) / 8);
    FetchTables::layout(experts, slots, reinterpret_cast<uint8_t*>(memory_.data()), &tables, &shared_bytes);
    std::fill_n(tables.slot_of_expert, experts, -1);
    std::fill_n(tables.expert_of_slot, slots, -1);
    *tables.counters = {};
    tables.recent_misses = &recent_misses_;
    call = {settings, experts, slots, tables, nullptr, nullptr};
  }

  // An empty text where both agree.
  std::string plan(int32_t const* counts, bool backwards) {
    auto& tables = call.tables;
    if (has_orders_) {
      tables.orders = {&number_, &count_, ordered_.data(), &guess_, number_ + 1};
      count_ = guess_ = -7;
    }
    std::fill_n(tables.arrivals.there, call.slots, moe_infer::kAllThere);
    std::fill_n(tables.chunks_done, call.slots, uint64_t{9});
    call.counts = counts;
    int32_t const own = (call.experts + kThreads - 1) / kThreads;
    own == 1 ? run<1>(backwards) : own == 2 ? run<2>(backwards) : run<4>(backwards);
    return compare(counts);
  }

 private:
  template <int kOwn>
  void run(bool backwards) {
    auto shared = typename moe_infer::BlockPlan<kThreads, kOwn>::Shared();
    std::memset(&shared, 0x5A, sizeof(shared));
    call.shared = &shared;
    turns.run(kThreads, run_thread<kOwn>, backwards);
    slots_told_.assign(shared.slot_of_expert, shared.slot_of_expert + call.experts);
  }

  std::string compare(int32_t const* counts) {
    auto const& tables = call.tables;
    int32_t const needed = moe_infer::plan_call(call.settings, &expected_, counts, plan_.data());
    int32_t misses = 0;
    for (int32_t i = 0; i < needed; ++i) {
      auto const& planned = plan_[static_cast<size_t>(i)];
      ++uses_[static_cast<size_t>(planned.expert)];
      int32_t const told = slots_told_[static_cast<size_t>(planned.expert)];
      if (told != (planned.hit != 0 ? planned.slot : moe_infer::pending(planned.slot))) return "an expert's slot";
      if (planned.hit != 0) continue;
      auto const& item = tables.items[misses];
      if (item.expert != planned.expert || item.slot != planned.slot) return "the list of misses";
      if (tables.chunks_done[misses] != 0) return "chunks that were done before";
      if (tables.arrivals.there[item.slot] != moe_infer::kNotThere) return "the flag of a miss";
      if (has_orders_ && std::memcmp(&ordered_[static_cast<size_t>(misses)], &item, sizeof(item)) != 0) return "orders";
      ++misses;
      evictions_ += planned.evicted >= 0 ? 1 : 0;
    }
    hits_ += needed - misses;
    misses_ += misses;
    if (*tables.item_count != misses) return "the number of misses";
    if (std::count(tables.arrivals.there, tables.arrivals.there + call.slots, moe_infer::kNotThere) != misses) {
      return "the flags of what is there";
    }
    if (has_orders_ && (number_ != tables.orders.wanted || *tables.listed != number_ || count_ != misses))
      return "orders";
    if (has_orders_ && guess_ != -1) return "a guess that nobody made";
    if (*tables.clock != expected_.clock) return "the clock";
    if (!std::equal(slot_of_expert_.begin(), slot_of_expert_.end(), tables.slot_of_expert)) return "slot_of_expert";
    if (!std::equal(expert_of_slot_.begin(), expert_of_slot_.end(), tables.expert_of_slot)) return "expert_of_slot";
    if (std::memcmp(histories_.data(), tables.histories, sizeof(ExpertHistory) * histories_.size()) != 0) {
      return "histories";
    }
    if (!std::equal(uses_.begin(), uses_.end(), tables.uses)) return "uses";
    auto const& counters = *tables.counters;
    if (counters.hits != hits_ || counters.misses != misses_ || counters.evictions != evictions_) return "counters";
    return "";
  }

  std::vector<int32_t> slot_of_expert_, expert_of_slot_;
  std::vector<ExpertHistory> histories_;
  CacheTables expected_;
  std::vector<PlannedExpert> plan_;
  std::vector<int64_t> uses_;
  int64_t hits_ = 0, misses_ = 0, evictions_ = 0;
  std::vector<uint64_t> memory_;
  std::vector<int32_t> slots_told_;
  float recent_misses_ = 0;
  uint32_t number_ = 0;
  int32_t count_ = 0, guess_ = 0;
  std::vector<moe_infer::FetchItem> ordered_;
  bool has_orders_;
};

}  // namespace

// `counts` (calls, experts). The first call in which the two ways differ, with what differs in `what`; -1: in none.
extern "C" int32_t plan_calls(int32_t kind, uint32_t half_life, int32_t experts, int32_t slots, int32_t orders,
                              int32_t calls, int32_t const* counts, char* what, int32_t what_bytes) {
  Caches caches({static_cast<moe_infer::PolicyKind>(kind), half_life}, experts, slots, orders != 0);
  for (int32_t i = 0; i < calls; ++i) {
    std::string const difference = caches.plan(counts + static_cast<int64_t>(i) * experts, i % 2 == 1);
    if (difference.empty()) continue;
    std::snprintf(what, static_cast<size_t>(what_bytes), "%s", difference.c_str());
    return i;
  }
  return -1;
}
