// Top-k and routing weights, one warp a token.
#include <type_traits>

#include "core/grid_dependency.cuh"
#include "core/launch.h"
#include "route/route.h"
#include "route/select_token.cuh"

namespace moe_infer {
namespace {

constexpr int kWarps = 4;

template <class Kind>
__global__ void __launch_bounds__(kSelectLanes* kWarps)
    select_kernel(RouterParams const params, void const* __restrict__ scores, DataType dtype, int64_t tokens,
                  int32_t* __restrict__ expert_of_choice, float* __restrict__ weight_of_choice) {
  wait_for_previous_kernel();
  start_next_kernel();
  int const lane = static_cast<int>(threadIdx.x) % kSelectLanes;
  int64_t const token = static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kSelectLanes;
  if (token >= tokens) return;  // the whole warp
  select_token<Kind>(params, {scores, dtype, token * params.experts}, lane, expert_of_choice + token * params.top_k,
                     weight_of_choice + token * params.top_k);
}

}  // namespace

void select_experts(TokenRouter const& router, int64_t tokens, Routing const& routing, bool overlap,
                    cudaStream_t stream) {
  if (tokens == 0) return;
  LaunchShape shape;
  shape.blocks = static_cast<unsigned>((tokens + kWarps - 1) / kWarps);
  shape.threads = kSelectLanes * kWarps;
  shape.overlap = overlap;
  shape.stream = stream;
  with_select_kind(router.params, router.params.experts, [&](auto kind) {
    launch(&select_kernel<decltype(kind)>, shape, router.params, router.scores, router.dtype, tokens,
           routing.expert_of_choice, routing.weight_of_choice);
  });
}

}  // namespace moe_infer
