#include "gemm/grouped_gemm.h"

#include "gemm/problems.h"

namespace moe_infer {
namespace {

bool aligned(void const* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

size_t grouped_gemm_workspace_bytes(int32_t groups) { return Problems::layout(groups, nullptr, nullptr); }

// The choice is made from the layer's sizes alone, so that resident and streaming runs agree in every bit.
void grouped_gemm(GroupedGemm const& gemm) {
  if (gemm.groups.count == 0) return;
  if (gemm.dtype == DataType::kFloat32) return grouped_gemm_float32(gemm, make_problems(gemm));
  // 16-byte loads: 8 elements at a time. Slots and the tensors in them are aligned to 256 bytes.
  if (gemm.n % 8 != 0 || gemm.k % 8 != 0 || !aligned(gemm.a) || !aligned(gemm.c)) return grouped_gemm_any(gemm);
  if (gemm.dtype == DataType::kFloat16) return grouped_gemm_float16(gemm, make_problems(gemm));
  return grouped_gemm_bfloat16(gemm, make_problems(gemm));
}

}  // namespace moe_infer
