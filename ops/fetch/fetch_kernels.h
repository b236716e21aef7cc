// The kernels of a fetch that the device drives (device_fetch.h).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/data_type.h"
#include "core/policy.h"
#include "fetch/expert_copy.h"
#include "route/route.h"

namespace moe_infer {

// The experts that a call needs; device arrays. Either the rows of each expert, or the experts of each choice.
struct NeededExperts {
  int32_t const* counts = nullptr;   // (experts)
  int32_t const* choices = nullptr;  // (choice_count), if counts is null
  int32_t choice_count = 0;
};

// One block. Plans the call as plan_call of policy.h does, where no more experts are needed than there are slots:
// brings the tables to the call's end, and lists the misses. `overlap`: core/launch.h.
void plan_fetch(PolicySettings const& settings, int32_t experts, int32_t slots, NeededExperts const& needed,
                FetchTables const& tables, bool overlap, cudaStream_t stream);

// For a single token: select_experts (route.h) and plan_fetch in one kernel.
void select_and_plan_fetch(RouterParams const& params, void const* scores, DataType scores_dtype,
                           Routing const& routing, PolicySettings const& settings, int32_t slots,
                           FetchTables const& tables, cudaStream_t stream);

// Copies what was planned, expert after expert, and sets there[slot] when one has come. The kernel after it may start
// as soon as this one has, and must not wait for it (ExpertGroups::there).
void copy_experts(ExpertCopy const& copy, bool overlap, cudaStream_t stream);

}  // namespace moe_infer
