#include "core/cuda_check.h"
#include "core/grid_dependency.cuh"
#include "core/launch.h"
#include "fetch/fetch_kernels.h"
#include "fetch/plan_block.cuh"
#include "route/select_token.cuh"

namespace moe_infer {
namespace {

constexpr int kThreads = 512;

__global__ void __launch_bounds__(kThreads)
    plan_kernel(PolicySettings const settings, int32_t const experts, int32_t const slots, int32_t const* counts,
                FetchTables const tables) {
  __shared__ PlanShared shared;
  wait_for_previous_kernel();
  start_next_kernel();
  BlockPlan<kThreads> plan(settings, experts, slots, tables, &shared);
  for (auto e = static_cast<int32_t>(threadIdx.x); e < experts; e += kThreads) {
    shared.is_needed[e] = counts[e] > 0 ? 1 : 0;
  }
  __syncthreads();
  plan.decide();
}

// The first warp chooses the token's experts while the others ask for the tables, then the block plans.
template <int kItems>
__global__ void __launch_bounds__(kThreads)
    select_and_plan_kernel(RouterParams const params, void const* __restrict__ scores, DataType dtype,
                           int32_t* expert_of_choice, float* weight_of_choice, PolicySettings const settings,
                           int32_t const slots, FetchTables const tables) {
  __shared__ PlanShared shared;
  __shared__ int32_t chosen[kMostPlannedChoices];
  start_next_kernel();
  auto const thread = static_cast<int32_t>(threadIdx.x);
  BlockPlan<kThreads> plan(settings, params.experts, slots, tables, &shared);
  for (int32_t e = thread; e < params.experts; e += kThreads) shared.is_needed[e] = 0;
  __syncthreads();
  if (thread < kSelectLanes) {
    auto const score = [&](int32_t expert) { return load_score(scores, dtype, expert); };
    select_token<kItems>(params, score, thread, chosen, weight_of_choice);
    __syncwarp();
    for (int32_t i = thread; i < params.top_k; i += kSelectLanes) {
      shared.is_needed[chosen[i]] = 1;
      expert_of_choice[i] = chosen[i];
    }
  }
  __syncthreads();
  plan.decide();
  __syncthreads();
  if (thread < params.top_k) tables.slot_of_choice[thread] = shared.slot_of_expert[chosen[thread]];
}

}  // namespace

void plan_fetch(PolicySettings const& settings, int32_t experts, int32_t slots, int32_t const* counts,
                FetchTables const& tables, bool overlap, cudaStream_t stream) {
  LaunchShape shape;
  shape.threads = kThreads;
  shape.overlap = overlap;
  shape.stream = stream;
  launch(&plan_kernel, shape, settings, experts, slots, counts, tables);
}

void select_and_plan_fetch(RouterParams const& params, void const* scores, DataType scores_dtype,
                           Routing const& routing, PolicySettings const& settings, int32_t slots,
                           FetchTables const& tables, cudaStream_t stream) {
  LaunchShape shape;
  shape.threads = kThreads;
  shape.stream = stream;
  with_select_items(params.experts, [&](auto items) {
    launch(&select_and_plan_kernel<decltype(items)::value>, shape, params, scores, scores_dtype,
           routing.expert_of_choice, routing.weight_of_choice, settings, slots, tables);
  });
}

}  // namespace moe_infer
