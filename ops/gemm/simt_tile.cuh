// Tiles of products on the FP32 units: how a block's threads share one out, and how operands lie in shared memory.
//
// Both operands are contiguous along k: rows of the input and rows of the weights, here columns of the product. A stage
// is kDepth of k for all lines (rows or columns) of a tile. It lies in shared memory as it does in global memory, in
// units of four floats along k, which a thread reads at once: four rows times four columns then cost 8 reads for 64
// multiplications, as many as with operands that are transposed on the way, and asynchronous copies can bring them.
//
// Two lines share the 128 bytes of the shared memory's width, and the units in there change places by an exclusive or:
//   unit `unit` of a line lies at (line / 2) * 8 + ((line % 2 * 4 + unit) ^ (line / 2 & kMask))
// so that the lines that a warp reads together are in different banks. Then adding to a line what is a multiple of 16
// adds to its place, and another unit is an exclusive or of the place: a thread has one place for its rows and one for
// its columns.
//
// Registers lie in two banks, even and odd numbers, and each gives one operand a cycle. A multiplication finds the
// column's element where the last one left it, and reads the row's and the sum. A unit takes four registers, whose
// banks alternate: were the same element of every row in the same bank, the sums would have to be in the other, and
// with the next element of k in this one. So where registers are the limit
// - a thread's odd rows (its second, fourth, ...) lie in shared memory with the elements of a unit swapped: y, x, w, z.
//   From row to row the banks alternate, and for every element of k they are evenly used;
// - the order of the rows turns with every column: the row at the turn is not read again.
#pragma once

#include <cstdint>

#include "core/element.cuh"
#include "gemm/async_copy.cuh"

namespace moe_infer::simt {

constexpr int kDepth = 16;
constexpr int kUnit = 4;  // floats
constexpr int kUnits = kDepth / kUnit;
constexpr int kLanes = 32;
// A warp's lanes form 4 x 8. Neighbours have different rows and the same columns, and the next but one the other way
// round: shared memory serves lanes that read the same together if they are that close.
constexpr int kLaneRows = 4;
constexpr int kLaneColumns = 8;
constexpr int kThreadRows = 8;

// kDown x kAcross warps. A thread has kThreadRows rows, equally far apart, so that in a tile with few rows all threads
// have few; and pairs of columns, gate and up of a gated product.
template <int kDown, int kAcross, int kColumnsOfThread, int kStageCount, int kBlockCount, int kUnrolled, bool kSwap>
struct Tile {
  static constexpr bool kSwapped = kSwap;  // odd rows, see above
  static constexpr int kThreads = kDown * kAcross * kLanes;
  static constexpr int kThreadColumns = kColumnsOfThread;
  static constexpr int kRowStep = kDown * kLaneRows;  // from a thread's row to its next
  static constexpr int kPairStep = 2 * kLaneColumns;  // from a thread's pair of columns to its next
  static constexpr int kRows = kThreadRows * kRowStep;
  static constexpr int kColumns = kAcross * kLaneColumns * kThreadColumns;
  static constexpr int kStages = kStageCount;
  static constexpr int kBlocks = kBlockCount;  // of a multiprocessor
  static constexpr int kUnroll = kUnrolled;    // units of the inner loop: more of them take more registers
  // In units:
  static constexpr int kStageUnits = (kRows + kColumns) * kUnits;
  static constexpr int kThreadUnits = kThreadRows * kThreadColumns / kUnit;  // of its sums
  static constexpr int kSharedUnits = kStages * kStageUnits + kThreadUnits * kThreads;
  static constexpr int kSharedBytes = kSharedUnits * 16;
  static_assert(kSharedBytes <= 99 * 1024, "what a block can have on every GPU since sm_80");
  static_assert(kThreadColumns % kUnit == 0 && kStages >= 2 && kThreads / kUnits % 16 == 0, "see the places of lines");
  static_assert(!kSwapped || kThreads / kUnits % (2 * kRowStep) == 0,
                "the rows that a thread loads are all odd or none");

  __device__ static int row_of(int thread) {
    int const lane = thread % kLanes;
    return thread / kLanes / kAcross * kLaneRows + lane % 2 + lane / 16 * 2;
  }
  __device__ static int column_of(int thread) {
    int const lane = thread % kLanes;
    return thread / kLanes % kAcross * (kLaneColumns * kThreadColumns) + lane / 2 % kLaneColumns * 2;
  }
  // Whether the rows that a thread loads are odd ones, in which elements are swapped.
  __device__ static bool loads_swapped(int thread) { return kSwapped && thread / kUnits / kRowStep % 2 != 0; }
};

// Many rows an expert: 128 x 128; with 8 x 16 sums a thread reads a fourth less of shared memory than with 8 x 8, which
// outweighs half the threads. Few: 32 x 128, more of which fit, for more weights on their way, and more threads.
using Wide = Tile<4, 1, 16, 2, 2, 1, true>;
using Narrow = Tile<1, 4, 4, 4, 4, kUnits, false>;

// As many places as lines that a warp reads together: four rows, of which two share 128 bytes, and eight pairs of
// columns.
constexpr int kRowMask = 1;
constexpr int kColumnMask = 7;

template <int kMask>
__device__ inline int place_of(int line, int unit) {
  int const pair = line / 2;
  return pair * 2 * kUnits + ((line % 2 * kUnits + unit) ^ (pair & kMask));
}

// In a thread's row or column i of a tile (0, 1, ...), the place of a unit, from that of its first row's or column's
// first unit.
template <class TileT>
__device__ inline int place_in_row(int place, int i, int unit) {
  return (place ^ unit) + i * TileT::kRowStep * kUnits;
}
template <class TileT>
__device__ inline int place_in_column(int place, int i, int unit) {
  return (place ^ unit ^ (i % 2 * kUnits)) + i / 2 * TileT::kPairStep * kUnits;
}

// The `count` elements at `source`, at most a unit of them, and zeros; nothing is read where it is 0 or less.
// kAligned: the count is that of a unit, or 0 or less. kSwap: the elements change places in pairs, as in odd rows.
template <class T, bool kAligned, bool kSwap>
__device__ inline void load_unit(float4* unit, T const* source, int count) {
  auto* const to = reinterpret_cast<float*>(unit);
  if constexpr (kAligned && !kSwap) {
    static_assert(sizeof(T) == sizeof(float), "other types have to be converted");
    copy_16_async(to, source, count > 0);
  } else if constexpr (sizeof(T) == sizeof(float)) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) copy_4_async(to + (i ^ int{kSwap}), source + i, (kAligned ? 0 : i) < count);
  } else {
    float loaded[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) loaded[i ^ int{kSwap}] = i < count ? to_float(source[i]) : 0.0F;
    *unit = {loaded[0], loaded[1], loaded[2], loaded[3]};
  }
}

// A thread's share in loading kLines lines, `stride` elements apart.
template <class T, bool kAligned, class TileT, int kLines, int kMask>
class LineLoader {
 public:
  // `lines`: of those from `first` on the number that is there, more or less than kLines.
  __device__ LineLoader(T const* first, int64_t stride, int64_t lines, int thread)
      : source_(first + thread / kUnits * stride + thread % kUnits * kUnit),
        place_(place_of<kMask>(thread / kUnits, thread % kUnits)) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) there_ |= static_cast<uint32_t>(thread / kUnits + i * kStep < lines) << i;
  }

  // The next stage. `left`: of k, from the thread's unit on.
  template <bool kSwap>
  __device__ void load(float4* stage, int64_t stride, int left) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      int const count = (there_ >> i & 1) != 0 ? left : 0;
      load_unit<T, kAligned, kSwap>(stage + place_ + i * kStep * kUnits, source_ + i * kStep * stride, count);
    }
    source_ += kDepth;
  }

 private:
  static constexpr int kStep = TileT::kThreads / kUnits;  // lines
  static constexpr int kCount = kLines / kStep;
  static_assert(kLines % kStep == 0 && kCount <= 32, "all threads load as much");

  T const* source_;
  int place_;
  uint32_t there_ = 0;
};

__device__ inline float element_of(float4 const& unit, int i) {
  return i == 0 ? unit.x : i == 1 ? unit.y : i == 2 ? unit.z : unit.w;
}

// Adds the products of a stage to a thread's sums, in the order of k. kActive: of its rows, the first so many.
template <class TileT, int kActive>
__device__ inline void multiply_stage(float4 const* stage, int row_place, int column_place,
                                      float (&sums)[kThreadRows][TileT::kThreadColumns]) {
  float4 const* const columns = stage + TileT::kRows * kUnits;
#pragma unroll TileT::kUnroll
  for (int unit = 0; unit < kUnits; ++unit) {
    float4 a[kActive];
#pragma unroll
    for (int i = 0; i < kActive; ++i) a[i] = stage[place_in_row<TileT>(row_place, i, unit)];
#pragma unroll
    for (int pair = 0; pair < TileT::kThreadColumns; pair += 2) {
      float4 b[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) b[j] = columns[place_in_column<TileT>(column_place, pair + j, unit)];
#pragma unroll
      for (int element = 0; element < kUnit; ++element) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
          for (int turn = 0; turn < kActive; ++turn) {
            int const i = j == 0 ? turn : kActive - 1 - turn;
            int const in_row = TileT::kSwapped ? element ^ i % 2 : element;
            float& sum = sums[i][pair + j];
            sum = fmaf(element_of(a[i], in_row), element_of(b[j], element), sum);
          }
        }
      }
    }
  }
}

}  // namespace moe_infer::simt
