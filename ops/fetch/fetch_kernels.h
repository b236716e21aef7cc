// The kernels of a fetch that the device drives (device_fetch.h).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/data_type.h"
#include "core/policy.h"
#include "fetch/expert_copy.h"
#include "fetch/guess.h"
#include "route/route.h"

namespace moe_infer {

// One block. Plans the call as plan_call of policy.h does, where no more experts are needed than there are slots:
// brings the tables to the call's end, and lists the misses. `counts` (experts): rows of each. `overlap`:
// core/launch.h. `head`: its tables are planned, and where it has head_chunks they are copied
// (copy_head_in_block).
void plan_fetch(PolicySettings const& settings, int32_t experts, int32_t slots, int32_t const* counts,
                ExpertCopy const& head, bool overlap, cudaStream_t stream);

// For a single token with at most kMostPlannedChoices experts: select_experts (route.h) and plan_fetch in one kernel;
// fills tables.slot_of_choice in, too. With a guess that is not empty it goes with the orders.
void select_and_plan_fetch(TokenRouter const& router, Routing const& routing, PolicySettings const& settings,
                           int32_t slots, ExpertCopy const& head, Guess const& guess, bool overlap,
                           cudaStream_t stream);

// Copies what was planned (or, without blocks, waits until others have copied it), expert after expert, and raises its
// slot's flag when one has come. The kernel after it may start as soon as this one has, and must not wait for it
// (ExpertGroups::arrivals).
void copy_experts(ExpertCopy const& copy, bool overlap, cudaStream_t stream);

}  // namespace moe_infer
