#include <algorithm>

#include "core/cuda_check.h"
#include "core/grid_dependency.cuh"
#include "core/launch.h"
#include "fetch/copy_block.cuh"
#include "fetch/fetch_kernels.h"
#include "fetch/plan_block.cuh"
#include "route/select_token.cuh"

namespace moe_infer {
namespace {

// Few: the block has to find room while the kernel before still runs, of which a layer's last one leaves no more
// registers than these take on a multiprocessor. Else nothing of what can be done ahead is.
constexpr int kThreads = 256;

// Of a thread, of so many (BlockPlan).
constexpr int own(int experts) { return (experts + kThreads - 1) / kThreads; }

// The blocks after the one that plans.
__device__ void copy_head(ExpertCopy const& head) {
  wait_for_previous_kernel();
  start_next_kernel();
  copy_head_in_block<kThreads>(head, blockIdx.x - 1);
}

unsigned blocks_of(ExpertCopy const& head) {
  constexpr unsigned kWarps = kThreads / kCopyLanes;
  return 1 + (head.head_chunks + kWarps - 1) / kWarps;
}

template <int kOwn>
__global__ void __launch_bounds__(kThreads)
    plan_kernel(PolicySettings const settings, int32_t const experts, int32_t const slots, int32_t const* counts,
                ExpertCopy const head) {
  if (blockIdx.x > 0) return copy_head(head);
  using Plan = BlockPlan<kThreads, kOwn>;
  __shared__ typename Plan::Shared shared;
  Plan plan(settings, experts, slots, head.tables, &shared);
  wait_for_previous_kernel();
  start_next_kernel();
  plan.begin();
  for (auto e = static_cast<int32_t>(threadIdx.x); e < experts; e += kThreads) {
    shared.is_needed[e] = counts[e] > 0 ? 1 : 0;
  }
  __syncthreads();
  plan.decide();
}

// One warp: the first of the experts that the next layer would choose and has in no slot, -1: none.
template <class Kind>
__device__ int32_t guess_missing(Guess const& guess, int32_t lane) {
  __shared__ int32_t chosen[kMostPlannedChoices];
  auto const& router = guess.router;
  choose_token<Kind>(router.params, {router.scores, router.dtype}, lane, chosen);
  __syncwarp();
  for (int32_t first = 0; first < router.params.top_k; first += kSelectLanes) {
    int32_t const i = first + lane;
    bool const is_absent = i < router.params.top_k && guess.slot_of_expert[chosen[i]] < 0;
    unsigned const absent = __ballot_sync(kSelectAll, is_absent);
    if (absent != 0) return chosen[first + __ffs(static_cast<int>(absent)) - 1];
  }
  return -1;
}

// The first warp chooses the token's experts and the second one guesses the next layer's, while the others ask for the
// tables; then the block plans.
template <class Kind>
__global__ void __launch_bounds__(kThreads)
    select_and_plan_kernel(RouterParams const params, void const* __restrict__ scores, DataType dtype,
                           int32_t* expert_of_choice, float* weight_of_choice, PolicySettings const settings,
                           int32_t const slots, ExpertCopy const head, Guess const guess) {
  if (blockIdx.x > 0) return copy_head(head);
  auto const& tables = head.tables;
  using Plan = BlockPlan<kThreads, own(Kind::kItems * kSelectLanes)>;
  __shared__ typename Plan::Shared shared;
  __shared__ int32_t chosen[kMostPlannedChoices];
  auto const thread = static_cast<int32_t>(threadIdx.x);
  Plan plan(settings, params.experts, slots, tables, &shared);
  for (int32_t e = thread; e < params.experts; e += kThreads) shared.is_needed[e] = 0;
  wait_for_previous_kernel();
  start_next_kernel();
  plan.begin();
  __syncthreads();
  if (thread < kSelectLanes) {
    select_token<Kind>(params, {scores, dtype}, thread, chosen, weight_of_choice);
    __syncwarp();
    for (int32_t i = thread; i < params.top_k; i += kSelectLanes) {
      shared.is_needed[chosen[i]] = 1;
      expert_of_choice[i] = chosen[i];
    }
  } else if (thread < 2 * kSelectLanes && guess.router.scores != nullptr) {
    int32_t const lane = thread - kSelectLanes;
    int32_t const expert = guess_missing<SelectKind<Kind::kItems, false>>(guess, lane);
    if (lane == 0) shared.guess = expert;
  }
  __syncthreads();
  plan.decide();
  if (thread < params.top_k) tables.slot_of_choice[thread] = shared.slot_of_expert[chosen[thread]];
}

}  // namespace

void plan_fetch(PolicySettings const& settings, int32_t experts, int32_t slots, int32_t const* counts,
                ExpertCopy const& head, bool overlap, cudaStream_t stream) {
  LaunchShape shape;
  shape.blocks = blocks_of(head);
  shape.threads = kThreads;
  shape.overlap = overlap;
  shape.stream = stream;
  with_select_items(experts, [&](auto items) {
    launch(&plan_kernel<own(decltype(items)::value * kSelectLanes)>, shape, settings, experts, slots, counts, head);
  });
}

void select_and_plan_fetch(TokenRouter const& router, Routing const& routing, PolicySettings const& settings,
                           int32_t slots, ExpertCopy const& head, Guess const& guess, bool overlap,
                           cudaStream_t stream) {
  LaunchShape shape;
  shape.blocks = blocks_of(head);
  shape.threads = kThreads;
  shape.overlap = overlap;
  shape.stream = stream;
  with_select_kind(router.params, std::max(router.params.experts, guess.router.params.experts), [&](auto kind) {
    launch(&select_and_plan_kernel<decltype(kind)>, shape, router.params, router.scores, router.dtype,
           routing.expert_of_choice, routing.weight_of_choice, settings, slots, head, guess);
  });
}

}  // namespace moe_infer
