// grouped[r] = hidden_states of the token of row r; a block a token, which reads it once and writes it top_k times, 16
// bytes a thread where all is aligned.
#include <algorithm>

#include "core/cuda_check.h"
#include "core/element.cuh"
#include "core/grid_dependency.cuh"
#include "core/launch.h"
#include "route/route.h"

namespace moe_infer {
namespace {

// `columns`: Units in a row.
template <class Unit>
__global__ void gather_kernel(Unit const* __restrict__ hidden_states, int32_t const* __restrict__ row_of_choice,
                              int64_t columns, int32_t top_k, Unit* __restrict__ grouped) {
  int64_t const token = blockIdx.x;
  int32_t const* const rows = row_of_choice + token * top_k;
  // What the layer is given has long been written (grid_dependency.cuh), only the rows may still be on their way.
  int64_t i = threadIdx.x;
  Unit unit = hidden_states[token * columns + min(i, columns - 1)];
  wait_for_previous_kernel();
  start_next_kernel();
  while (i < columns) {
    for (int32_t k = 0; k < top_k; ++k) grouped[rows[k] * columns + i] = unit;
    i += blockDim.x;
    if (i < columns) unit = hidden_states[token * columns + i];
  }
}

template <class Unit>
void gather(void const* hidden_states, int64_t tokens, int64_t row_bytes, int32_t top_k, Routing const& routing,
            void* grouped, bool overlap, cudaStream_t stream) {
  int64_t const columns = row_bytes / static_cast<int64_t>(sizeof(Unit));
  LaunchShape shape;
  shape.blocks = static_cast<unsigned>(tokens);
  shape.threads = static_cast<unsigned>(std::min<int64_t>(256, (columns + 31) / 32 * 32));
  shape.overlap = overlap;
  shape.stream = stream;
  launch(&gather_kernel<Unit>, shape, static_cast<Unit const*>(hidden_states), routing.row_of_choice, columns, top_k,
         static_cast<Unit*>(grouped));
}

}  // namespace

void gather_rows(void const* hidden_states, DataType dtype, int64_t tokens, int64_t d_model, int32_t top_k,
                 Routing const& routing, void* grouped, bool overlap, cudaStream_t stream) {
  if (tokens == 0) return;
  int64_t const row_bytes = d_model * static_cast<int64_t>(size_of(dtype));
  if (row_bytes % 16 == 0 && is_aligned(hidden_states) && is_aligned(grouped)) {
    gather<uint4>(hidden_states, tokens, row_bytes, top_k, routing, grouped, overlap, stream);
  } else if (dtype == DataType::kFloat32) {
    gather<uint32_t>(hidden_states, tokens, row_bytes, top_k, routing, grouped, overlap, stream);
  } else {
    gather<uint16_t>(hidden_states, tokens, row_bytes, top_k, routing, grouped, overlap, stream);
  }
}

}  // namespace moe_infer
