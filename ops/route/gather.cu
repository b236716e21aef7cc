// grouped[r] = hidden_states of the token of row r's choice; a block a row, 16 bytes a thread where all is aligned.
#include <algorithm>

#include "core/cuda_check.h"
#include "core/element.cuh"
#include "core/grid_dependency.cuh"
#include "route/route.h"

namespace moe_infer {
namespace {

// `columns`: Units in a row.
template <class Unit>
__global__ void gather_kernel(Unit const* __restrict__ hidden_states, int32_t const* __restrict__ choice_of_row,
                              int64_t columns, int32_t top_k, Unit* __restrict__ grouped) {
  wait_for_previous_kernel();
  start_next_kernel();
  int64_t const row = blockIdx.x;
  int64_t const token = choice_of_row[row] / top_k;
  for (int64_t i = threadIdx.x; i < columns; i += blockDim.x) {
    grouped[row * columns + i] = hidden_states[token * columns + i];
  }
}

template <class Unit>
void gather(void const* hidden_states, int64_t tokens, int64_t row_bytes, int32_t top_k, Routing const& routing,
            void* grouped, cudaStream_t stream) {
  int64_t const columns = row_bytes / static_cast<int64_t>(sizeof(Unit));
  auto const threads = static_cast<unsigned>(std::min<int64_t>(256, (columns + 31) / 32 * 32));
  gather_kernel<<<static_cast<unsigned>(tokens * top_k), threads, 0, stream>>>(
      static_cast<Unit const*>(hidden_states), routing.choice_of_row, columns, top_k, static_cast<Unit*>(grouped));
  MOE_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void gather_rows(void const* hidden_states, DataType dtype, int64_t tokens, int64_t d_model, int32_t top_k,
                 Routing const& routing, void* grouped, cudaStream_t stream) {
  if (tokens == 0) return;
  int64_t const row_bytes = d_model * static_cast<int64_t>(size_of(dtype));
  if (row_bytes % 16 == 0 && is_aligned(hidden_states) && is_aligned(grouped)) {
    gather<uint4>(hidden_states, tokens, row_bytes, top_k, routing, grouped, stream);
  } else if (dtype == DataType::kFloat32) {
    gather<uint32_t>(hidden_states, tokens, row_bytes, top_k, routing, grouped, stream);
  } else {
    gather<uint16_t>(hidden_states, tokens, row_bytes, top_k, routing, grouped, stream);
  }
}

}  // namespace moe_infer
