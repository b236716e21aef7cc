#include <algorithm>

#include "core/cuda_check.h"
#include "core/element.cuh"
#include "core/grid_dependency.cuh"
#include "core/launch.h"
#include "core/layer_config.h"
#include "core/slices.h"
#include "fetch/copy_block.cuh"
#include "gemm/group_search.cuh"
#include "route/select_token.cuh"
#include "sublayers/token_feed_forward.h"

namespace moe_infer {
namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kRows = 4;            // weight rows that a warp reads at once
constexpr int kUnroll = 2;          // 16-byte pieces of each row in flight, a lane
constexpr int64_t kLongRow = 8192;  // elements from which several warps share a row of `down`
constexpr int kPartsOfLongRow = 4;
// Blocks that a multiprocessor should hold, by the registers that this leaves.
template <class T>
constexpr int kBlocks = sizeof(T) == 2 ? 4 : 3;
constexpr int kMostChoices = TokenFeedForward::kMostChoices;
constexpr size_t kMostTokenBytes = 40 * 1024;

// Whose experts are run. That kGiven has two cases is on purpose: with the second one compiled apart the first is 0.2
// us slower (128 experts, an H200).
enum class Choice {
  kGiven,     // of a token, all resident; or (`expert_of_choice` null) the first group's one, on its one row
  kHere,      // of a token, all resident: every block chooses (TokenChoices::router)
  kStreamed,  // of a token; some may be on their way
};

// What both kernels are given.
struct Parameters {
  TokenFeedForward layer;
  ExpertGroups groups;
  TokenRouter router;
  int32_t const* expert_of_choice;
  float* weight_of_choice;
  int32_t top_k;
  bool keep;                      // base_layer: adds (1 - weight) * token
  int32_t const* slot_of_choice;  // TokenChoices
  void const* token;
  void* inner;
  void* output;
  uint32_t blocks_of_choice;  // of the first kernel
  ExpertCopy copy;            // if it has blocks: those of the first kernel that come before all others
};

// Which expert a block works for.
struct Expert {
  uint8_t const* slot;
  int64_t row;      // of inner, token and output
  int32_t awaited;  // number of the slot while the expert is on its way, else -1
};

// `chosen`: what the block chose, Choice::kHere.
template <Choice kChoice>
__device__ bool find_expert(Parameters const& p, int32_t const* chosen, int32_t choice, Expert* expert) {
  int32_t slot;
  expert->awaited = -1;
  if (kChoice == Choice::kHere) {
    slot = chosen[choice];  // each in the slot of its number
    expert->row = choice;
  } else if (p.expert_of_choice != nullptr) {
    if constexpr (kChoice == Choice::kStreamed) {
      slot = p.slot_of_choice[choice];
      if (slot < 0) slot = expert->awaited = pending(slot);  // its own inverse
    } else {
      slot = p.expert_of_choice[choice];
    }
    expert->row = choice;
  } else {
    expert->row = p.groups.row_begin[0];
    if (p.groups.row_end[0] <= expert->row) return false;
    slot = p.groups.slot_of_group[0];
  }
  expert->slot = p.groups.slots + static_cast<uint64_t>(slot) * p.groups.slot_bytes;
  return true;
}

// The block waits until what the first kernel reads of the expert is there.
__device__ void wait_in_block(Parameters const& p, Expert* expert) {
  if (expert->awaited < 0) return;
  if (threadIdx.x == 0) wait_for_expert(p.groups.arrivals, expert->awaited, kFirstThere);
  __syncthreads();
  // load_once may not be moved before this.
  asm volatile("" : "+l"(expert->slot)::"memory");
}

// The warp waits until all of the expert is there.
__device__ void wait_in_warp(Parameters const& p, Expert* expert) {
  if (expert->awaited < 0) return;
  if (threadIdx.x % kLanes == 0) wait_for_expert(p.groups.arrivals, expert->awaited, kAllThere);
  __syncwarp();
  asm volatile("" : "+l"(expert->slot)::"memory");
}

// 16 bytes that are read once: they need not stay in the L1 cache.
__device__ uint4 load_once(void const* address) {
  uint4 bits;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
      : "l"(address));
  return bits;
}

// Two 16-bit values, or one of 32 bits, of a register.
__device__ void unpack(uint32_t bits, float* values, ElementTag<float>) { values[0] = __uint_as_float(bits); }
__device__ void unpack(uint32_t bits, float* values, ElementTag<__nv_bfloat16>) {
  values[0] = __uint_as_float(bits << 16);
  values[1] = __uint_as_float(bits & 0xffff0000U);
}
__device__ void unpack(uint32_t bits, float* values, ElementTag<__half>) {
  float2 const pair = __half22float2(*reinterpret_cast<__half2 const*>(&bits));
  values[0] = pair.x;
  values[1] = pair.y;
}
template <class T>
__device__ void unpack(uint4 const& bits, float (&values)[kPackSize<T>]) {
  constexpr int kEach = static_cast<int>(4 / sizeof(T));
  unpack(bits.x, values, ElementTag<T>{});
  unpack(bits.y, values + kEach, ElementTag<T>{});
  unpack(bits.z, values + 2 * kEach, ElementTag<T>{});
  unpack(bits.w, values + 3 * kEach, ElementTag<T>{});
}

// A warp: sums[i] += row i of `weights` times `vector`, over 16-byte pieces first .. end; afterwards in every lane.
template <class T>
__device__ void multiply(T const* weights, int64_t stride, T const* vector, int32_t first, int32_t end,
                         float (&sums)[kRows]) {
  int32_t const lane = static_cast<int32_t>(threadIdx.x) % kLanes;
  for (int32_t piece = first + lane; piece < end; piece += kLanes * kUnroll) {
    uint4 w[kUnroll][kRows];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (piece + u * kLanes < end) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          w[u][i] = load_once(weights + i * stride + static_cast<int64_t>(piece + u * kLanes) * kPackSize<T>);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (piece + u * kLanes < end) {
        float x[kPackSize<T>];
        unpack<T>(reinterpret_cast<uint4 const*>(vector)[piece + u * kLanes], x);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          float values[kPackSize<T>];
          unpack<T>(w[u][i], values);
#pragma unroll
          for (int e = 0; e < kPackSize<T>; ++e) sums[i] = fmaf(values[e], x[e], sums[i]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) sums[i] += __shfl_xor_sync(0xffffffffU, sums[i], offset);
  }
}

// The block's sum, in an order that depends on nothing.
__device__ float block_sum(float value, float* partial) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffU, value, offset);
  if (threadIdx.x % kLanes == 0) partial[threadIdx.x / kLanes] = value;
  __syncthreads();
  float sum = 0.0F;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += partial[warp];
  return sum;
}

// The block's threads from `first` on: the token into shared memory.
template <class T>
__device__ void stage_token(T const* token, int32_t pieces, T* staged, int32_t first) {
  for (int32_t i = static_cast<int32_t>(threadIdx.x) - first; i < pieces; i += kThreads - first) {
    reinterpret_cast<uint4*>(staged)[i] = reinterpret_cast<uint4 const*>(token)[i];
  }
}

// The block: T5's norm of the staged token.
template <class T>
__device__ void normalize_token(TokenFeedForward const& layer, Expert const& expert, T* staged) {
  using Unit = Pack<T, kPackSize<T>>;
  __shared__ float partial[kWarps];
  auto const pieces = static_cast<int32_t>(layer.shape.d_model / kPackSize<T>);
  float squares = 0.0F;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < pieces; i += kThreads) {
    Unit const unit = reinterpret_cast<Unit const*>(staged)[i];
#pragma unroll
    for (int e = 0; e < kPackSize<T>; ++e) squares = fmaf(to_float(unit.value[e]), to_float(unit.value[e]), squares);
  }
  float const root = sqrtf(block_sum(squares, partial) / static_cast<float>(layer.shape.d_model) + kRmsNormEpsilon);
  auto const* const scale = reinterpret_cast<Unit const*>(expert.slot + layer.norm_offset);
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < pieces; i += kThreads) {  // what this thread has read
    Unit unit = reinterpret_cast<Unit*>(staged)[i];
    Unit const weight = scale[i];
#pragma unroll
    for (int e = 0; e < kPackSize<T>; ++e) {
      unit.value[e] = from_float<T>(to_float(weight.value[e]) * (to_float(unit.value[e]) / root));
    }
    reinterpret_cast<Unit*>(staged)[i] = unit;
  }
  __syncthreads();
}

// Asks for the first bytes of a warp's weight rows ahead of their use. Not for more: what all blocks ask for must fit
// into the L2 cache.
template <class T>
__device__ void prefetch_rows(T const* weights, int64_t stride, int64_t elements) {
  constexpr int64_t kMost = 1024;
  constexpr int64_t kLine = 128;
  int64_t const bytes = min(kMost, elements * static_cast<int64_t>(sizeof(T)));
  constexpr int kLinesOfRow = static_cast<int>(kMost / kLine);
  constexpr int kAtOnce = kLanes / kLinesOfRow;
  static_assert(kRows % kAtOnce == 0, "whole rounds");
  int64_t const at = static_cast<int64_t>(threadIdx.x % kLinesOfRow) * kLine;
#pragma unroll
  for (int i = 0; i < kRows; i += kAtOnce) {
    auto const* const row = weights + (i + static_cast<int>(threadIdx.x % kLanes) / kLinesOfRow) * stride;
    if (at < bytes) asm volatile("prefetch.global.L2 [%0];" ::"l"(reinterpret_cast<uint8_t const*>(row) + at));
  }
}

static_assert(kMostChosenByAll <= kSelectLanes, "an expert a lane");

// The block's first warp: Choice::kHere.
__device__ void choose_in_warp(TokenRouter const& router, int32_t* chosen) {
  auto const lane = static_cast<int>(threadIdx.x);
  TokenScores const scores{router.scores, router.dtype};
  if (ranks_by_sigmoid(router.params)) {
    choose_token<SelectKind<1, false>>(router.params, scores, lane, chosen);
  } else {
    choose_token<SelectKind<1, true>>(router.params, scores, lane, chosen);
  }
}

// The same with the weights, which only the second kernel's end needs: one block of the first kernel does it.
__device__ void weigh_in_warp(TokenRouter const& router, int32_t* chosen, float* weights) {
  auto const lane = static_cast<int>(threadIdx.x);
  select_token<SelectKind<1, false>>(router.params, {router.scores, router.dtype}, lane, chosen, weights);
}

// inner row: act(gate) * up, or act(up). Each choice has p.blocks_of_choice blocks, whose warps have kRows weight rows
// each. The grid is one row: as a row of its own of the grid, the blocks that copy would be as many as a choice's, and
// multiprocessors that idle ones wait on would get fewer of the others.
template <class T, Choice kChoice>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) first_kernel(Parameters const p) {
  extern __shared__ uint4 raw[];
  __shared__ int32_t chosen[kChoice == Choice::kHere ? kMostChosenByAll : 1];
  auto* const staged = reinterpret_cast<T*>(raw);
  wait_for_previous_kernel();
  start_next_kernel();
  uint32_t block = blockIdx.x;
  if constexpr (kChoice == Choice::kStreamed) {
    // The first blocks: they are on a multiprocessor before any block that waits for what they copy.
    if (block < p.copy.blocks) return copy_in_block<kThreads>(p.copy, block);
    block -= p.copy.blocks;
  }
  auto const& layer = p.layer;
  int64_t const d_model = layer.shape.d_model;
  auto const pieces = static_cast<int32_t>(d_model / kPackSize<T>);
  auto const* token = static_cast<T const*>(p.token);
  if constexpr (kChoice == Choice::kHere) {
    if (block == 0) {
      if (threadIdx.x < kLanes) weigh_in_warp(p.router, chosen, p.weight_of_choice);
      return;
    }
    --block;
    if (threadIdx.x < kLanes) {
      choose_in_warp(p.router, chosen);
    } else {
      stage_token(token, pieces, staged, kLanes);
    }
    __syncthreads();
  }
  Expert expert;
  if (!find_expert<kChoice>(p, chosen, static_cast<int32_t>(block / p.blocks_of_choice), &expert)) return;
  if constexpr (kChoice == Choice::kStreamed) wait_in_block(p, &expert);
  bool const gated = layer.activation.gated;
  int64_t const weight_rows = gated ? 2 * layer.shape.hidden_size : layer.shape.hidden_size;
  int64_t const row = (static_cast<int64_t>(block % p.blocks_of_choice) * kWarps + threadIdx.x / kLanes) * kRows;
  auto const* const weights = reinterpret_cast<T const*>(expert.slot + layer.first_offset) + row * d_model;
  bool const is_staged = kChoice == Choice::kHere;
  if (row < weight_rows && (!is_staged || layer.has_norm)) prefetch_rows(weights, d_model, d_model);
  if (!is_staged) {
    if (p.expert_of_choice == nullptr) token += expert.row * d_model;
    stage_token(token, pieces, staged, 0);
    __syncthreads();
  }
  if (layer.has_norm) normalize_token(layer, expert, staged);
  if (row >= weight_rows) return;
  float sums[kRows] = {};
  multiply(weights, d_model, staged, 0, pieces, sums);

  if (threadIdx.x % kLanes != 0) return;
  if (layer.has_bias) {
    auto const* const bias = reinterpret_cast<T const*>(expert.slot + layer.first_bias_offset) + row;
#pragma unroll
    for (int i = 0; i < kRows; ++i) sums[i] += to_float(bias[i]);
  }
  auto* const inner = static_cast<T*>(p.inner) + expert.row * layer.shape.hidden_size;
  if (gated) {
#pragma unroll
    for (int i = 0; i < kRows; i += 2) {
      inner[(row + i) / 2] = from_float<T>(apply_gated(layer.activation, sums[i], sums[i + 1]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRows; ++i) inner[row + i] = from_float<T>(apply_plain(layer.activation, sums[i]));
  }
}

// output = sum over the choices of weight * (down(inner row) + ...). A block has `quads` times kRows channels; its
// warps share out quads, choices and parts of the rows, and the parts meet in shared memory in a fixed order.
template <class T, Choice kChoice>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    second_kernel(Parameters const p, int32_t quads, int32_t parts) {
  extern __shared__ float results[];  // (quads, choices, parts, kRows)
  __shared__ float choice_weights[kMostChoices];
  __shared__ int32_t chosen[kChoice == Choice::kHere ? kMostChosenByAll : 1];
  auto const& layer = p.layer;
  int64_t const d_model = layer.shape.d_model;
  int64_t const hidden = layer.shape.hidden_size;
  bool const one = kChoice == Choice::kGiven && p.expert_of_choice == nullptr;
  int32_t const choices = one ? 1 : p.top_k;
  int32_t const warp = static_cast<int32_t>(threadIdx.x) / kLanes;
  int32_t const work = quads * choices * parts;
  auto const pieces = static_cast<int32_t>(hidden / kPackSize<T>);
  int32_t const pieces_of_part = (pieces + parts - 1) / parts;
  int64_t const first_channel = static_cast<int64_t>(blockIdx.x) * quads * kRows;

  // Which experts were chosen has long been written (grid_dependency.cuh), only `inner` may still be on its way.
  Expert expert = {};
  bool waited = false;
  if (one) {
    wait_for_previous_kernel();
    start_next_kernel();
    waited = true;
    if (!find_expert<kChoice>(p, chosen, 0, &expert)) return;
  } else if (kChoice == Choice::kHere) {
    if (threadIdx.x < kLanes) choose_in_warp(p.router, chosen);
    __syncthreads();
  } else if (threadIdx.x < choices) {
    choice_weights[threadIdx.x] = p.weight_of_choice[threadIdx.x];
  }
  for (int32_t item = warp; item < work; item += kWarps) {
    int32_t const part = item % parts;
    int32_t const choice = item / parts % choices;
    int64_t const channel = first_channel + static_cast<int64_t>(item / parts / choices) * kRows;
    if (channel >= d_model) break;
    if (!one) find_expert<kChoice>(p, chosen, choice, &expert);
    auto const* weights = reinterpret_cast<T const*>(expert.slot + layer.down_offset) + channel * hidden;
    int32_t const first = part * pieces_of_part;
    int32_t const end = min(pieces, first + pieces_of_part);
    if (!waited) {
      prefetch_rows(weights + static_cast<int64_t>(first) * kPackSize<T>, hidden,
                    static_cast<int64_t>(end - first) * kPackSize<T>);
      wait_for_previous_kernel();
      start_next_kernel();
      waited = true;
    }
    if constexpr (kChoice == Choice::kStreamed) {
      wait_in_warp(p, &expert);
      weights = reinterpret_cast<T const*>(expert.slot + layer.down_offset) + channel * hidden;
    }
    float sums[kRows] = {};
    multiply(weights, hidden, static_cast<T const*>(p.inner) + expert.row * hidden, first, end, sums);
    if (threadIdx.x % kLanes < kRows) {
      float value = 0.0F;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (static_cast<int>(threadIdx.x % kLanes) == i) value = sums[i];
      }
      results[item * kRows + static_cast<int32_t>(threadIdx.x) % kLanes] = value;
    }
  }
  if (!waited) {
    wait_for_previous_kernel();
    start_next_kernel();
  }
  if (kChoice == Choice::kHere && threadIdx.x < choices) {
    choice_weights[threadIdx.x] = p.weight_of_choice[threadIdx.x];
  }
  __syncthreads();

  int32_t const thread = static_cast<int32_t>(threadIdx.x);
  int64_t const channel = first_channel + thread;
  if (thread >= quads * kRows || channel >= d_model) return;
  auto const* token = static_cast<T const*>(p.token);
  if (one) token += expert.row * d_model;
  float sum = 0.0F;
  for (int32_t choice = 0; choice < choices; ++choice) {
    float value = 0.0F;
    for (int32_t part = 0; part < parts; ++part) {
      value += results[((thread / kRows * choices + choice) * parts + part) * kRows + thread % kRows];
    }
    if (layer.has_bias) {
      if (!one) find_expert<kChoice>(p, chosen, choice, &expert);
      value += to_float(reinterpret_cast<T const*>(expert.slot + layer.down_bias_offset)[channel]);
    }
    if (layer.has_norm) value += to_float(token[channel]);
    T const rounded = from_float<T>(value);
    if (one) {
      static_cast<T*>(p.output)[expert.row * d_model + channel] = rounded;
      return;
    }
    sum = fmaf(choice_weights[choice], to_float(rounded), sum);
  }
  if (p.keep) sum = fmaf(1.0F - choice_weights[0], to_float(token[channel]), sum);
  static_cast<T*>(p.output)[channel] = from_float<T>(sum);
}

unsigned divide_up(int64_t a, int64_t b) { return static_cast<unsigned>((a + b - 1) / b); }

template <Choice kChoice>
void run_kernels(Parameters p, bool overlap, cudaStream_t stream) {
  auto const& shape = p.layer.shape;
  int32_t const choices = p.top_k;
  with_element(shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    LaunchShape first;
    int64_t const weight_rows = p.layer.activation.gated ? 2 * shape.hidden_size : shape.hidden_size;
    p.blocks_of_choice = divide_up(weight_rows, kWarps * kRows);
    unsigned const weighing = kChoice == Choice::kHere ? 1 : 0;
    first.blocks = p.copy.blocks + weighing + static_cast<unsigned>(choices) * p.blocks_of_choice;
    first.threads = kThreads;
    first.shared_bytes = static_cast<size_t>(shape.d_model) * sizeof(T);
    first.overlap = overlap;
    first.stream = stream;
    launch(&first_kernel<T, kChoice>, first, p);

    int32_t const parts = shape.hidden_size >= kLongRow ? kPartsOfLongRow : 1;
    int32_t const quads = std::max(1, kWarps / (choices * parts));
    LaunchShape second = first;
    second.blocks = divide_up(shape.d_model, static_cast<int64_t>(quads) * kRows);
    second.shared_bytes = static_cast<size_t>(quads * choices * parts * kRows) * sizeof(float);
    launch(&second_kernel<T, kChoice>, second, p, quads, parts);
  });
}

}  // namespace

bool TokenFeedForward::can_run(SubLayerShape const& shape) {
  auto const unit = static_cast<int64_t>(16 / size_of(shape.dtype));
  // 8 and not 4 rows, so that a warp's rows are whole also where gate and up alternate, and for any type.
  return shape.d_model % 8 == 0 && shape.hidden_size % 8 == 0 && shape.d_model % unit == 0 &&
         static_cast<size_t>(shape.d_model) * size_of(shape.dtype) <= kMostTokenBytes;
}

size_t TokenFeedForward::inner_bytes(int64_t experts) const {
  return aligned_size(static_cast<size_t>(experts * shape.hidden_size) * size_of(shape.dtype));
}

void TokenFeedForward::run(ExpertGroups const& groups, TokenChoices const& token, void* inner, bool overlap,
                           cudaStream_t stream) const {
  Parameters const p{*this,
                     groups,
                     token.router,
                     token.expert_of_choice,
                     token.weight_of_choice,
                     token.top_k,
                     token.keep,
                     token.slot_of_choice,
                     token.hidden_states,
                     inner,
                     token.output,
                     0,
                     token.copy};
  if (token.slot_of_choice != nullptr) return run_kernels<Choice::kStreamed>(p, overlap, stream);
  if (token.router.scores != nullptr) return run_kernels<Choice::kHere>(p, overlap, stream);
  run_kernels<Choice::kGiven>(p, overlap, stream);
}

void TokenFeedForward::run_expert(SubLayerCall const& call, void* inner) const {
  Parameters const p{*this,   call.groups, {},    nullptr,     nullptr, 1, false,
                     nullptr, call.input,  inner, call.output, 0,       {}};
  run_kernels<Choice::kGiven>(p, false, call.stream);
}

}  // namespace moe_infer
