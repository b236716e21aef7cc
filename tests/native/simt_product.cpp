// ops/gemm/simt_kernel.cuh on the host: the threads of a block are contexts that take turns at every barrier.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>

#include "turns.h"

inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
void __syncthreads();

// The activations are there for nvcc alone.
#define __CUDACC__
#include "gemm/activation.cuh"
#undef __CUDACC__
#include "gemm/simt_kernel.cuh"

namespace {

constexpr size_t kMostThreads = 256;

Turns turns;
std::array<moe_infer::HostCopies, kMostThreads> copies;

}  // namespace

void __syncthreads() { turns.operate(); }

namespace moe_infer {
bool copies_land_late = false;
HostCopies& copies_of_this_thread() { return copies[turns.thread()]; }
}  // namespace moe_infer

namespace {

struct Call {
  moe_infer::GroupedGemm const* gemm;
  int64_t block;
  int64_t blocks;
  float4* shared;
} call;

template <class T, bool kAligned, class TileT>
void run_thread() {
  moe_infer::simt::run_block<T, kAligned, TileT>(*call.gemm, call.block, call.blocks, static_cast<int>(turns.thread()),
                                                 call.shared);
}

template <class T, bool kAligned, class TileT>
void run_blocks(moe_infer::GroupedGemm const& gemm, int64_t blocks, bool backwards) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  auto const shared = std::make_unique<float4[]>(TileT::kSharedUnits);
  for (int64_t i = 0; i < blocks; ++i) {
    std::fill_n(shared.get(), TileT::kSharedUnits, float4{kNaN, kNaN, kNaN, kNaN});
    call = {&gemm, i, blocks, shared.get()};
    copies.fill({});
    turns.run(TileT::kThreads, run_thread<T, kAligned, TileT>, backwards);
  }
}

template <class T, bool kAligned>
void run_tile(moe_infer::GroupedGemm const& gemm, bool narrow, int64_t blocks, bool backwards) {
  if (narrow) {
    run_blocks<T, kAligned, moe_infer::simt::Narrow>(gemm, blocks, backwards);
  } else {
    run_blocks<T, kAligned, moe_infer::simt::Wide>(gemm, blocks, backwards);
  }
}

}  // namespace

// How a product is run, which must not change a bit of it.
struct Way {
  int32_t narrow;
  int32_t aligned;
  int32_t blocks;
  int32_t late;  // copies land when they are waited for, and the last thread of a block comes first
};

struct Sizes {
  int32_t groups;
  int32_t kind;  // ActivationKind
  int32_t gated;
  int32_t is_half;
  int64_t rows;
  int64_t n;
  int64_t k;
  int64_t input_stride;
  int64_t slot_bytes;
  int64_t weight_offset;
  int64_t bias_offset;  // -1: none
};

extern "C" void run_product(Sizes const* sizes, Way const* way, int32_t const* row_begin, int32_t const* row_end,
                            int32_t const* slot_of_group, uint8_t const* slots, void const* input, void const* source,
                            void* output) {
  moe_infer::GroupedGemm gemm;
  gemm.groups = {sizes->groups, row_begin, row_end, slot_of_group, slots, static_cast<uint64_t>(sizes->slot_bytes), {}};
  gemm.rows = sizes->rows;
  gemm.n = sizes->n;
  gemm.k = sizes->k;
  gemm.weight_offset = static_cast<uint64_t>(sizes->weight_offset);
  gemm.input = input;
  gemm.input_stride = sizes->input_stride;
  gemm.has_bias = sizes->bias_offset >= 0;
  gemm.bias_offset = gemm.has_bias ? static_cast<uint64_t>(sizes->bias_offset) : 0;
  gemm.source = source;
  gemm.output = output;
  gemm.activation.kind = static_cast<moe_infer::ActivationKind>(sizes->kind);
  gemm.activation.gated = sizes->gated != 0;
  moe_infer::copies_land_late = way->late != 0;
  bool const narrow = way->narrow != 0;
  bool const backwards = way->late != 0;
  if (sizes->is_half != 0) {
    run_tile<__half, false>(gemm, narrow, way->blocks, backwards);
  } else if (way->aligned != 0) {
    run_tile<float, true>(gemm, narrow, way->blocks, backwards);
  } else {
    run_tile<float, false>(gemm, narrow, way->blocks, backwards);
  }
}

namespace {

template <class TileT>
void places(int thread, int32_t* rows, int32_t* columns, int32_t* loaded) {
  using namespace moe_infer::simt;
  for (int unit = 0; unit < kUnits; ++unit) {
    for (int i = 0; i < kThreadRows; ++i) {
      *rows++ = place_in_row<TileT>(place_of<kRowMask>(TileT::row_of(thread), 0), i, unit);
    }
    for (int i = 0; i < TileT::kThreadColumns; ++i) {
      *columns++ = place_in_column<TileT>(place_of<kColumnMask>(TileT::column_of(thread), 0), i, unit);
    }
  }
  loaded[0] = place_of<kRowMask>(thread / kUnits, thread % kUnits);
  loaded[1] = place_of<kColumnMask>(thread / kUnits, thread % kUnits);
}

}  // namespace

// What a thread reads of the rows (at most 64) and of the columns (64) of a stage, and what it writes first of either
// (2); in units of 16 bytes. Returns the threads of a block.
extern "C" int32_t shared_places(int32_t narrow, int32_t thread, int32_t* rows, int32_t* columns, int32_t* loaded) {
  using namespace moe_infer::simt;
  if (narrow != 0) {
    places<Narrow>(thread, rows, columns, loaded);
    return Narrow::kThreads;
  }
  places<Wide>(thread, rows, columns, loaded);
  return Wide::kThreads;
}
