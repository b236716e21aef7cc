// Which expert lies in which slot: every decision of an expert cache, in one place.
//
// The host-driven cache (expert_cache.cpp), a kernel that fetches, and the simulator (capi_simulate.cpp) all take their
// decisions from here, so that one trace gives the same hits, misses and victims everywhere. Hence plain structs and
// integer arithmetic only: no containers, no floating point, nothing that depends on the machine.
//
// Decisions of one call, in this order (plan_call is the serial statement of it; another implementation must give the
// same list):
//   1. The clock of the cache goes up by one: the first call has clock 1. A call that needs nothing counts too.
//   2. record_use for every needed expert, hit or miss, with that clock; `fetched` of those that miss becomes the
//      clock. From here to the end of the call nothing changes any expert's retention.
//   3. Hits: needed experts that have a slot now, in ascending order of their number; they may run in any order. They
//      keep their slots until they have run.
//   4. Misses: the other needed experts, in ascending order. Each takes the slot that choose_slot gives.
// choose_slot takes the slot with the smallest (group, retention, slot number) among those that are not among the last
// fills_in_flight() fills of this call, with
//      group 0: empty;  group 1: its expert is not needed in this call;  group 2: its expert is needed in this call.
//
// What follows, and may be relied upon:
//   - hits = needed experts that had a slot when the call began; misses = needed experts - hits, whatever the policy.
//   - Needed experts <= slots: no slot of group 2 is taken; at the end of the call all needed experts have slots, each
//     its own. The victims are the misses' number of slots of group 0 and 1 in ascending (group, retention, slot): a
//     parallel selection gives the same as choosing one after another.
//   - Needed experts > slots: when the first slot of group 2 is taken, no slot of group 0 or 1 is left. Two fills into
//     the same slot have at least fills_in_flight() others between them, so copies overlap with the experts that run;
//     a fill into a slot of group 2 must wait until the expert in it has run.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MOE_HOST_DEVICE __host__ __device__
#else
#define MOE_HOST_DEVICE
#endif

namespace moe_infer {

enum class PolicyKind : int32_t {
  kLru,           // the least recently used expert leaves
  kLfu,           // the least frequently used one, where a use counts half after half_life calls
  kHalvedCounts,  // whole counts, halved every half_life calls; of equals the one fetched last leaves: survives scans
};

// The arithmetic below cannot overflow up to here.
constexpr uint32_t kMostHalfLife = 16384;

struct PolicySettings {
  PolicyKind kind = PolicyKind::kHalvedCounts;
  uint32_t half_life = 128;  // calls, 1 to kMostHalfLife; kLru does not look at it
};

// What a policy remembers of an expert, in a slot or not: an expert that comes back is judged by all its uses.
struct ExpertHistory {
  uint64_t last_use = 0;  // clock; 0: never
  uint32_t count = 0;     // uses as they counted at last_use; of kLfu in units of 1 / kOneUse
  uint32_t fetched = 0;   // low bits of the clock of the call that fetched it last
};
static_assert(sizeof(ExpertHistory) == 16);

constexpr uint32_t kOneUse = 1U << 16U;

// `count` after `calls` calls without a use: half for every half_life. In between a cubic with the slope of 2^-x at 0,
// right to 0.14 %, so that many short steps lose as much as a long one.
MOE_HOST_DEVICE inline uint32_t decayed(uint32_t count, uint64_t calls, uint32_t half_life) {
  if (calls >= 32ULL * half_life) {
    return 0;
  }
  auto const passed = static_cast<uint32_t>(calls);
  uint64_t const whole = count >> (passed / half_life);
  // All in units of 2^-32: x = rest / half_life; 2^-x is about 1 - x (a - x (b - x c)).
  constexpr uint64_t a = 2977044472, b = 1031764991, c = 202204167;
  uint64_t const x = (static_cast<uint64_t>(passed % half_life) << 32U) / half_life;
  uint64_t const lost = x * (a - (x * (b - (x * c >> 32U)) >> 32U)) >> 32U;
  return static_cast<uint32_t>(whole - (whole * lost >> 32U));
}

// `count` as of `last_use` after the halvings that all counts go through when the clock is a multiple of half_life.
MOE_HOST_DEVICE inline uint32_t halved(uint32_t count, uint64_t last_use, uint64_t clock, uint32_t half_life) {
  uint64_t const halvings = clock / half_life - last_use / half_life;
  return halvings < 32 ? count >> halvings : 0;
}

// An expert is needed in the call with this clock. Once for each expert and call, however many tokens chose it.
MOE_HOST_DEVICE inline void record_use(PolicySettings const& settings, ExpertHistory* history, uint64_t clock) {
  if (settings.kind == PolicyKind::kHalvedCounts) {
    history->count = halved(history->count, history->last_use, clock, settings.half_life) + 1;  // <= 2 * half_life
  } else {
    // Converges below kOneUse * (1.5 * half_life + 1), which is less than 2^32.
    history->count = decayed(history->count, clock - history->last_use, settings.half_life) + kOneUse;
  }
  history->last_use = clock;
}

// How much an expert is worth keeping in the call with this clock; the smallest leaves first. Below 2^62.
MOE_HOST_DEVICE inline uint64_t retention(PolicySettings const& settings, ExpertHistory const& history,
                                          uint64_t clock) {
  if (settings.kind == PolicyKind::kLru) {
    return history.last_use;
  }
  if (settings.kind == PolicyKind::kLfu) {
    return decayed(history.count, clock - history.last_use, settings.half_life);
  }
  uint64_t const count = halved(history.count, history.last_use, clock, settings.half_life);
  // Calls since it was fetched; unsigned, hence right across the wrap of 32 bits.
  return count << 32U | (static_cast<uint32_t>(clock) - history.fetched);
}

// The tables of one cache. An expert has at most one slot and a slot at most one expert, and the two agree.
struct CacheTables {
  int32_t expert_count = 0;
  int32_t slot_count = 0;              // at least 1
  int32_t* slot_of_expert = nullptr;   // (expert_count); -1: in no slot
  int32_t* expert_of_slot = nullptr;   // (slot_count); -1: empty
  ExpertHistory* histories = nullptr;  // (expert_count)
  uint64_t clock = 0;                  // calls so far
};

struct PlannedExpert {
  int32_t expert;
  int32_t slot;
  int32_t evicted;  // expert that was in the slot, -1: none; always -1 of a hit
  int32_t hit;      // 1: was in the slot when the call began
};

// Slots that were filled last in a call and are not filled again at once: one is being copied into, one is waited for
// or runs.
MOE_HOST_DEVICE inline int32_t fills_in_flight(int32_t slot_count) { return slot_count > 2 ? 2 : slot_count - 1; }

// Slot for the next miss. `counts` (expert_count): of experts that the call needs > 0. `filled`: the call's misses so
// far, in their order, `fills` of them.
MOE_HOST_DEVICE inline int32_t choose_slot(PolicySettings const& settings, CacheTables const& tables,
                                           int32_t const* counts, PlannedExpert const* filled, int32_t fills) {
  int32_t const blocked = fills < fills_in_flight(tables.slot_count) ? fills : fills_in_flight(tables.slot_count);
  int32_t best = -1;
  int32_t best_group = 0;
  uint64_t best_retention = 0;
  for (int32_t slot = 0; slot < tables.slot_count; ++slot) {
    bool is_blocked = false;
    for (int32_t i = fills - blocked; i < fills; ++i) {
      is_blocked = is_blocked || filled[i].slot == slot;
    }
    if (is_blocked) {
      continue;
    }
    int32_t const expert = tables.expert_of_slot[slot];
    int32_t const group = expert < 0 ? 0 : (counts[expert] > 0 ? 2 : 1);
    uint64_t const worth = expert < 0 ? 0 : retention(settings, tables.histories[expert], tables.clock);
    if (best < 0 || group < best_group || (group == best_group && worth < best_retention)) {
      best = slot;
      best_group = group;
      best_retention = worth;
    }
  }
  return best;
}

// Plans one call and brings the tables to its end. `counts` (expert_count): rows of each expert, > 0: needed. `plan`
// has room for all needed experts; hits first, then misses, in the order in which these must run. Returns their number.
MOE_HOST_DEVICE inline int32_t plan_call(PolicySettings const& settings, CacheTables* tables, int32_t const* counts,
                                         PlannedExpert* plan) {
  ++tables->clock;
  int32_t hits = 0;
  for (int32_t expert = 0; expert < tables->expert_count; ++expert) {
    if (counts[expert] > 0) {
      record_use(settings, &tables->histories[expert], tables->clock);
      if (tables->slot_of_expert[expert] >= 0) {
        plan[hits++] = {expert, tables->slot_of_expert[expert], -1, 1};
      } else {
        tables->histories[expert].fetched = static_cast<uint32_t>(tables->clock);
      }
    }
  }
  PlannedExpert* const filled = plan + hits;
  int32_t fills = 0;
  int32_t next_hit = 0;  // hits may lose their slots below; the plan still knows them
  for (int32_t expert = 0; expert < tables->expert_count; ++expert) {
    if (counts[expert] <= 0) {
      continue;
    }
    if (next_hit < hits && plan[next_hit].expert == expert) {
      ++next_hit;
      continue;
    }
    int32_t const slot = choose_slot(settings, *tables, counts, filled, fills);
    int32_t const evicted = tables->expert_of_slot[slot];
    if (evicted >= 0) {
      tables->slot_of_expert[evicted] = -1;
    }
    tables->expert_of_slot[slot] = expert;
    tables->slot_of_expert[expert] = slot;
    filled[fills++] = {expert, slot, evicted, 0};
  }
  return hits + fills;
}

}  // namespace moe_infer
