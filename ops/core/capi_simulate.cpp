// The part of the C entry that replays traces: the decisions of an expert cache, without a GPU.
#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include "core/capi_error.h"
#include "core/policy.h"
#include "core/policy_settings.h"

namespace moe_infer {
namespace {

static_assert(sizeof(moe_infer_planned_expert) == sizeof(PlannedExpert) &&
              offsetof(moe_infer_planned_expert, expert) == offsetof(PlannedExpert, expert) &&
              offsetof(moe_infer_planned_expert, slot) == offsetof(PlannedExpert, slot) &&
              offsetof(moe_infer_planned_expert, evicted) == offsetof(PlannedExpert, evicted) &&
              offsetof(moe_infer_planned_expert, hit) == offsetof(PlannedExpert, hit));

constexpr int32_t kMostSimulatedExperts = 1 << 24;

PolicySettings settings_of(char const* policy) {
  return policy == nullptr ? policy_from_environment() : parse_policy(policy, "policy");
}

[[noreturn]] void refuse(std::string const& what, int64_t found, std::string const& expected) {
  throw invalid("moe_infer_simulate: " + what + " must be " + expected + ", got " + std::to_string(found));
}

void check_sizes(moe_infer_trace const& trace, int32_t slots) {
  std::string const bound = " to " + std::to_string(kMostSimulatedExperts);
  if (trace.expert_count < 1 || trace.expert_count > kMostSimulatedExperts) {
    refuse("expert_count", trace.expert_count, "1" + bound);
  }
  if (slots < 1 || slots > kMostSimulatedExperts) {
    refuse("slots", slots, "1" + bound);
  }
  if (trace.calls < 0) {
    refuse("calls", trace.calls, "0 or more");
  }
}

// The whole trace, before anything is written.
void check_calls(moe_infer_trace const& trace) {
  if (trace.offsets[0] != 0) {
    refuse("offsets[0]", trace.offsets[0], "0");
  }
  for (int64_t call = 0; call < trace.calls; ++call) {
    int64_t const begin = trace.offsets[call];
    int64_t const end = trace.offsets[call + 1];
    if (end < begin || end - begin > trace.expert_count) {
      refuse("offsets[" + std::to_string(call + 1) + "]", end,
             std::to_string(begin) + " to " + std::to_string(begin + trace.expert_count));
    }
    int32_t least = 0;
    for (int64_t i = begin; i < end; ++i) {
      int32_t const expert = trace.experts[i];
      if (expert < least || expert >= trace.expert_count) {
        refuse("expert " + std::to_string(i - begin) + " of call " + std::to_string(call), expert,
               "from " + std::to_string(least) + " to " + std::to_string(trace.expert_count - 1) +
                   " (each once, ascending)");
      }
      least = expert + 1;
    }
  }
}

void simulate(PolicySettings const& settings, moe_infer_trace const& trace, int32_t slots, int32_t* hits,
              moe_infer_planned_expert* plan) {
  auto const experts = static_cast<size_t>(trace.expert_count);
  std::vector<int32_t> slot_of_expert(experts, -1);
  std::vector<int32_t> expert_of_slot(static_cast<size_t>(slots), -1);
  std::vector<ExpertHistory> histories(experts);
  CacheTables tables{trace.expert_count, slots, slot_of_expert.data(), expert_of_slot.data(), histories.data(), 0};
  std::vector<int32_t> counts(experts);
  std::vector<PlannedExpert> planned(experts);
  for (int64_t call = 0; call < trace.calls; ++call) {
    int32_t const* const begin = trace.experts + trace.offsets[call];
    int32_t const* const end = trace.experts + trace.offsets[call + 1];
    for (auto const* expert = begin; expert != end; ++expert) {
      counts[static_cast<size_t>(*expert)] = 1;
    }
    int32_t const needed = plan_call(settings, &tables, counts.data(), planned.data());
    for (auto const* expert = begin; expert != end; ++expert) {
      counts[static_cast<size_t>(*expert)] = 0;
    }
    int32_t hit = 0;
    for (int32_t i = 0; i < needed; ++i) {
      hit += planned[static_cast<size_t>(i)].hit;
    }
    if (hits != nullptr) {
      hits[call] = hit;
    }
    if (plan != nullptr && needed > 0) {
      std::memcpy(plan + trace.offsets[call], planned.data(), sizeof(PlannedExpert) * static_cast<size_t>(needed));
    }
  }
}

}  // namespace
}  // namespace moe_infer

extern "C" {

int moe_infer_policy(const char* policy, char* text) {
  return moe_infer::guarded([&] {
    if (text == nullptr) {
      throw moe_infer::invalid("moe_infer_policy: text must not be NULL");
    }
    auto const found = moe_infer::to_text(moe_infer::settings_of(policy));
    std::memcpy(text, found.c_str(), found.size() + 1);
  });
}

int moe_infer_simulate(const char* policy, const moe_infer_trace* trace, int32_t slots, int32_t* hits,
                       moe_infer_planned_expert* plan) {
  return moe_infer::guarded([&] {
    if (trace == nullptr || trace->offsets == nullptr || trace->experts == nullptr) {
      throw moe_infer::invalid("moe_infer_simulate: trace, its offsets and its experts must not be NULL");
    }
    auto const settings = moe_infer::settings_of(policy);
    moe_infer::check_sizes(*trace, slots);
    moe_infer::check_calls(*trace);
    moe_infer::simulate(settings, *trace, slots, hits, plan);
  });
}

}  // extern "C"
