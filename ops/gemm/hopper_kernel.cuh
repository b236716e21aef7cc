// The grouped product on Hopper's tensor cores.
//
// Weights are operand A and rows of hidden states operand B: a tensor-core instruction has 64 rows of A but 8 to 256 of
// B in steps, so a tile of few rows costs what its rows cost, and one design serves few tokens and thousands. A
// unit of work is 128 weight rows times up to kTokens rows. Three warpgroups: one warp copies both operands into a ring
// of stages in shared memory (TMA), one warp claims units, and two warpgroups multiply 64 weight rows each, apply bias
// and activation, transpose through shared memory and store whole 16 bytes.
//
// kGated: gate and up rows alternate in memory; the copy engine puts 8 gate rows and then their 8 up rows into a
// stage, whereby a thread's sums hold both (see weights_map in hopper.cu).
//
// kCluster 2: two blocks work on 256 weight rows and the same rows of the input, of which each copies half into both.
#pragma once

#include "core/element.cuh"
#include "core/grid_dependency.cuh"
#include "gemm/activation.cuh"
#include "gemm/hopper_primitives.cuh"
#include "gemm/hopper_units.cuh"

namespace moe_infer::hopper {

constexpr int kWeightRows = 128;  // of a unit in one block
constexpr int kDepth = 64;        // of k in a stage: 128 bytes, the width of the swizzle
constexpr int kRowBytes = 128;
constexpr int kWeightStage = kWeightRows * kRowBytes;
constexpr int kMultipliers = 2;  // warpgroups
constexpr int kMultiplierWarps = 4 * kMultipliers;
constexpr int kThreads = 128 * (1 + kMultipliers);
constexpr int kStoredRows = 32;  // rows that the epilogue stores at a time
constexpr int kStoreBytes = kStoredRows * kRowBytes;

// What a kernel is given besides the maps of its operands.
struct Product {
  ExpertGroups groups;
  int32_t blocks = 0;    // of channels, 128 * cluster weight rows each
  int32_t k_steps = 0;   // of kDepth
  int32_t channels = 0;  // columns of the output
  void* output = nullptr;
  void const* source = nullptr;  // (rows, channels), added; nullptr: none
  uint64_t bias_offset = 0;      // in a slot
  bool has_bias = false;
  Activation activation;
  int32_t* counters = nullptr;
};

// kTokens rows of the input at most, in copies of kBoxRows.
template <int kTokens_, int kBoxRows_, int kStages_, int kStoreBuffers_, int kCluster_>
struct Tile {
  static constexpr int kTokens = kTokens_;
  static constexpr int kStages = kStages_;
  static constexpr int kCluster = kCluster_;
  static constexpr int kBoxRows = kBoxRows_;
  static constexpr int kStoreBuffers = kStoreBuffers_;
  static constexpr int kTokenStage = kTokens * kRowBytes;
  static_assert(kBoxRows % 8 == 0 && kTokens % kBoxRows == 0, "the swizzle repeats every 8 rows");
};

template <class TileT>
struct SharedStorage {
  alignas(1024) uint8_t weights[TileT::kStages][kWeightStage];
  alignas(1024) uint8_t tokens[TileT::kStages][TileT::kTokenStage];
  alignas(1024) uint8_t store[kMultipliers][TileT::kStoreBuffers][kStoreBytes];
  alignas(16) UnitQueue queue;
  uint64_t full[TileT::kStages];
  uint64_t empty[TileT::kStages];
  int32_t units_end[kMaxExperts];
};
template <class TileT>
constexpr size_t kSharedBytes = sizeof(SharedStorage<TileT>) + 1024;  // the address may have to be rounded up

// A place in the ring of stages.
template <int kStages>
struct StagePlace {
  uint32_t stage = 0;
  uint32_t phase = 0;
  __device__ void next() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

template <class TileT, bool kGated>
class Producer {
 public:
  __device__ Producer(SharedStorage<TileT>* shared, CUtensorMap const* weights, CUtensorMap const* tokens,
                      Product const* product)
      : shared_(shared), weights_(weights), tokens_(tokens), product_(product), rank_(cluster_rank()) {}

  // One thread.
  __device__ void run() {
    QueuePlace queue;
    ask_for_unit();
    Unit unit = take_unit_alone<TileT::kCluster>(&shared_->queue, &queue);
    // The first unit's weights depend on no other kernel: they are on their way while the one before still runs.
    int32_t const k_steps = product_->k_steps;
    int32_t early = unit.rows == 0 ? 0 : min(k_steps, TileT::kStages);
    for (int32_t step = 0; step < early; ++step) copy_weights(unit, step);
    wait_for_previous_kernel();

    // Late (schedule_units), but so that the next unit is there when this one's last copies are on their way.
    int32_t const ask_at = max(0, k_steps - kAskAhead);
    while (unit.rows != 0) {
      for (int32_t step = 0; step < k_steps; ++step) {
        if (step >= early) copy_weights(unit, step);
        copy_tokens(unit, step);
        if (step == ask_at) ask_for_unit();
      }
      early = 0;
      unit = take_unit_alone<TileT::kCluster>(&shared_->queue, &queue);
    }
  }

 private:
  // Steps before the end of a unit: a claim takes some microseconds, in which the stages that are full are worked on.
  // Earlier was slower.
  static constexpr int32_t kAskAhead = 5;

  __device__ void ask_for_unit() {
    if (rank_ == 0) barrier_arrive(&shared_->queue.wanted);
  }

  // Of the input, for a unit; each block of the cluster copies every second one.
  __device__ static int32_t boxes_of(Unit const& unit) { return (unit.rows + TileT::kBoxRows - 1) / TileT::kBoxRows; }

  // First of the sixteen-row pieces of the weights that this block works on.
  __device__ int32_t sixteens_of(Unit const& unit) const {
    return (unit.block * TileT::kCluster + static_cast<int32_t>(rank_)) * (kWeightRows / 16);
  }

  __device__ void copy_weights(Unit const& unit, int32_t step) {
    uint32_t const stage = weights_place_.stage;
    barrier_wait(&shared_->empty[stage], weights_place_.phase ^ 1);
    uint64_t* const full = &shared_->full[stage];
    barrier_arrive_expect(full, static_cast<uint32_t>(kWeightStage + boxes_of(unit) * TileT::kBoxRows * kRowBytes));
    int32_t const sixteens = sixteens_of(unit);
    // A call with few rows reads each weight once.
    constexpr auto kPolicy = TileT::kTokens <= 64 ? CachePolicy::kReadOnce : CachePolicy::kNormal;
    if constexpr (kGated) {
      copy_5d(shared_->weights[stage], *weights_, full, step * kDepth, 0, 0, sixteens, unit.slot, kPolicy);
    } else {
      copy_5d(shared_->weights[stage], *weights_, full, step * kDepth, 0, 2 * sixteens, 0, unit.slot, kPolicy);
    }
    weights_place_.next();
  }

  __device__ void copy_tokens(Unit const& unit, int32_t step) {
    uint32_t const stage = tokens_place_.stage;
    uint64_t* const full = &shared_->full[stage];
    for (int32_t box = static_cast<int32_t>(rank_); box < boxes_of(unit); box += TileT::kCluster) {
      uint8_t* const to = shared_->tokens[stage] + box * TileT::kBoxRows * kRowBytes;
      int32_t const row = unit.row + box * TileT::kBoxRows;
      if constexpr (TileT::kCluster == 1) {
        copy_2d(to, *tokens_, full, step * kDepth, row);
      } else {
        copy_2d_to_all(to, *tokens_, full, step * kDepth, row, (1U << TileT::kCluster) - 1);
      }
    }
    tokens_place_.next();
  }

  SharedStorage<TileT>* shared_;
  CUtensorMap const* weights_;
  CUtensorMap const* tokens_;
  Product const* product_;
  uint32_t rank_;
  StagePlace<TileT::kStages> weights_place_, tokens_place_;
};

template <class T>
__device__ inline uint32_t pack_pair(float low, float high) {
  Pack<T, 2> pair;
  pair.value[0] = from_float<T>(low);
  pair.value[1] = from_float<T>(high);
  return *reinterpret_cast<uint32_t const*>(&pair);
}

// A warpgroup: multiplies its 64 weight rows of each unit and stores the result.
template <class T, class TileT, bool kGated>
class Multiplier {
 public:
  __device__ Multiplier(SharedStorage<TileT>* shared, Product const* product)
      : shared_(shared),
        product_(product),
        group_(static_cast<int32_t>(threadIdx.x) / 128 - 1),
        warp_(static_cast<int32_t>(threadIdx.x) / 32 % 4),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        rank_(static_cast<int32_t>(cluster_rank())) {}

  __device__ void run() {
    QueuePlace queue;
    for (;;) {
      Unit const unit = take_unit<TileT::kCluster>(&shared_->queue, &queue);
      if (unit.rows == 0) break;
      compute_narrowest<TileT::kBoxRows>(unit);
    }
  }

 private:
  static constexpr int kChannels = kGated ? 32 : 64;  // of the output, a warpgroup
  static constexpr int kChunks = kChannels / 8;       // of 16 bytes in a row of the store buffer

  // With few columns that cover the rows.
  template <int kN>
  __device__ void compute_narrowest(Unit const& unit) {
    if constexpr (kN >= TileT::kTokens) {
      compute<TileT::kTokens>(unit);
    } else {
      if (unit.rows <= kN) {
        compute<kN>(unit);
      } else {
        compute_narrowest<kN + (TileT::kTokens <= 32 ? kN : TileT::kBoxRows)>(unit);
      }
    }
  }

  template <int kN>
  __device__ void compute(Unit const& unit) {
    float sums[kN / 2] = {};
    uint32_t previous = 0;
    for (int32_t step = 0; step < product_->k_steps; ++step) {
      barrier_wait(&shared_->full[place_.stage], place_.phase);
      uint64_t const a =
          descriptor(shared_address(shared_->weights[place_.stage]) + static_cast<uint32_t>(group_) * 64 * kRowBytes);
      uint64_t const b = descriptor(shared_address(shared_->tokens[place_.stage]));
      hold(sums);
      mma_begin();
#pragma unroll
      for (int i = 0; i < kDepth / 16; ++i) {
        multiply<kN>(a + i * kDescriptorStep, b + i * kDescriptorStep, sums, step > 0 || i > 0);
      }
      mma_commit();
      hold(sums);
      if (step > 0) {
        mma_wait<1>();
        release(previous);
      }
      previous = place_.stage;
      place_.next();
    }
    mma_wait<0>();
    hold(sums);
    release(previous);
    store<kN>(unit, sums);
  }

  // One instruction, or two where none has kN columns.
  template <int kN>
  __device__ static void multiply(uint64_t a, uint64_t b, float (&sums)[kN / 2], bool add) {
    constexpr int kFirst = has_mma(kN) ? kN : kN == 48 ? 32 : kN - 32;
    mma<T, kFirst>(a, b, sums, add);
    if constexpr (kFirst < kN) {
      mma<T, kN - kFirst>(a, b + (kFirst * kRowBytes >> 4), sums + kFirst / 2, add);
    }
  }

  __device__ void release(uint32_t stage) {
    if constexpr (TileT::kCluster == 1) {
      if (lane_ == 0) barrier_arrive(&shared_->empty[stage]);
    } else {
      if (lane_ < TileT::kCluster) barrier_arrive_at(&shared_->empty[stage], static_cast<uint32_t>(lane_));
    }
  }

  template <int kN>
  __device__ void store(Unit const& unit, float (&sums)[kN / 2]) {
    if (!waited_) {
      wait_for_previous_kernel();  // it may still read what this one is about to overwrite
      waited_ = true;
    }
    int32_t const block = unit.block * TileT::kCluster + rank_;
    int32_t const first_channel = (block * kMultipliers + group_) * kChannels;
    finish<kN>(unit, first_channel, sums);
#pragma unroll
    for (int first = 0; first < kN; first += kStoredRows) {
      constexpr int kRows = kN < kStoredRows ? kN : kStoredRows;
      if (first >= unit.rows) break;
      uint8_t* const buffer = shared_->store[group_][buffer_];
      // With two buffers the barrier of the round before says that this one has been read.
      if constexpr (TileT::kStoreBuffers == 1) named_barrier(1 + static_cast<uint32_t>(group_), 128);
      to_buffer<kN, kRows>(buffer, first, sums);
      named_barrier(1 + static_cast<uint32_t>(group_), 128);
      from_buffer<kRows>(buffer, unit, first, first_channel);
      if constexpr (TileT::kStoreBuffers == 2) buffer_ ^= 1;
    }
  }

  // Bias, activation and source, in place: afterwards sums[4j], sums[4j + 1] (and, not gated, [4j + 2], [4j + 3])
  // belong to the output.
  template <int kN>
  __device__ void finish(Unit const& unit, int32_t first_channel, float (&sums)[kN / 2]) {
    T const* const bias =
        product_->has_bias ? reinterpret_cast<T const*>(product_->groups.slots +
                                                        unit.slot * product_->groups.slot_bytes + product_->bias_offset)
                           : nullptr;
    // The kind is known before the loops over the sums, and each loop has the code of one kind only.
    Activation activation = product_->activation;
    switch (activation.kind) {
      case ActivationKind::kNone:
        return finish_as<ActivationKind::kNone, kN>(unit, first_channel, bias, activation, sums);
      case ActivationKind::kSilu:
        return finish_as<ActivationKind::kSilu, kN>(unit, first_channel, bias, activation, sums);
      case ActivationKind::kGelu:
        return finish_as<ActivationKind::kGelu, kN>(unit, first_channel, bias, activation, sums);
      case ActivationKind::kGeluTanh:
        return finish_as<ActivationKind::kGeluTanh, kN>(unit, first_channel, bias, activation, sums);
      case ActivationKind::kRelu:
        return finish_as<ActivationKind::kRelu, kN>(unit, first_channel, bias, activation, sums);
      case ActivationKind::kClampedSwiGlu:
        return finish_as<ActivationKind::kClampedSwiGlu, kN>(unit, first_channel, bias, activation, sums);
    }
  }

  template <ActivationKind kKind, int kN>
  __device__ void finish_as(Unit const& unit, int32_t first_channel, T const* bias, Activation activation,
                            float (&sums)[kN / 2]) {
    activation.kind = kKind;
    if constexpr (kGated) {
      int32_t const channel = first_channel + warp_ * 8 + lane_ / 4;
      float gate_bias = 0.0F;
      float up_bias = 0.0F;
      if (bias != nullptr && channel < product_->channels) {
        gate_bias = to_float(bias[2 * channel]);
        up_bias = to_float(bias[2 * channel + 1]);
      }
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          sums[4 * j + i] = apply_gated<true>(activation, sums[4 * j + i] + gate_bias, sums[4 * j + 2 + i] + up_bias);
        }
      }
    } else {
      auto const* const source = static_cast<T const*>(product_->source);
      int32_t const channel = first_channel + warp_ * 16 + lane_ / 4;
      if (kKind == ActivationKind::kNone && bias == nullptr && source == nullptr) return;
      float const low = bias != nullptr && channel < product_->channels ? to_float(bias[channel]) : 0.0F;
      float const high = bias != nullptr && channel + 8 < product_->channels ? to_float(bias[channel + 8]) : 0.0F;
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float value = apply_plain<true>(activation, sums[4 * j + i] + (i < 2 ? low : high));
          int32_t const row = 8 * j + 2 * (lane_ % 4) + i % 2;
          int32_t const at = channel + (i < 2 ? 0 : 8);
          if (source != nullptr && row < unit.rows && at < product_->channels) {
            value += to_float(source[static_cast<int64_t>(unit.row + row) * product_->channels + at]);
          }
          sums[4 * j + i] = value;
        }
      }
    }
  }

  // Where chunk `chunk` of row `row` lies in the store buffer: shuffled so that the 8 rows of a matrix lie in different
  // banks.
  __device__ static uint32_t place_in_buffer(int32_t row, int32_t chunk) {
    if constexpr (kGated) return static_cast<uint32_t>(row * 64 + (chunk ^ (row / 2 % 4)) * 16);
    return static_cast<uint32_t>(row * 128 + (chunk ^ (row % 8)) * 16);
  }

  template <int kN, int kRows>
  __device__ void to_buffer(uint8_t* buffer, int first, float const (&sums)[kN / 2]) const {
    uint32_t const base = shared_address(buffer);
    constexpr int kEights = kRows / 8;  // of rows
    if constexpr (kGated) {
      constexpr int kTogether = kEights >= 4 ? 4 : kEights;
#pragma unroll
      for (int e = 0; e < kEights; e += kTogether) {
        uint32_t values[kTogether];
#pragma unroll
        for (int m = 0; m < kTogether; ++m) {
          int const j = first / 8 + e + m;
          values[m] = pack_pair<T>(sums[4 * j], sums[4 * j + 1]);
        }
        int32_t const row = (e + lane_ / 8 % kTogether) * 8 + lane_ % 8;
        store_transposed<kTogether>(base + place_in_buffer(row, warp_), values);
      }
    } else {
      constexpr int kTogether = kEights >= 2 ? 2 : 1;
#pragma unroll
      for (int e = 0; e < kEights; e += kTogether) {
        uint32_t values[2 * kTogether];
#pragma unroll
        for (int m = 0; m < kTogether; ++m) {
          int const j = first / 8 + e + m;
          values[2 * m] = pack_pair<T>(sums[4 * j], sums[4 * j + 1]);
          values[2 * m + 1] = pack_pair<T>(sums[4 * j + 2], sums[4 * j + 3]);
        }
        int32_t const matrix = lane_ / 8 % (2 * kTogether);
        int32_t const row = (e + matrix / 2) * 8 + lane_ % 8;
        store_transposed<2 * kTogether>(base + place_in_buffer(row, 2 * warp_ + matrix % 2), values);
      }
    }
  }

  template <int kRows>
  __device__ void from_buffer(uint8_t const* buffer, Unit const& unit, int first, int32_t first_channel) const {
    int32_t const thread = warp_ * 32 + lane_;
#pragma unroll
    for (int i = 0; i < (kRows * kChunks + 127) / 128; ++i) {
      int32_t const item = i * 128 + thread;
      int32_t const row = item / kChunks;
      int32_t const chunk = item % kChunks;
      int32_t const channel = first_channel + chunk * 8;
      if (row < kRows && first + row < unit.rows && channel < product_->channels) {
        auto* const to = static_cast<T*>(product_->output) +
                         static_cast<int64_t>(unit.row + first + row) * product_->channels + channel;
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<uint4 const*>(buffer + place_in_buffer(row, chunk));
      }
    }
  }

  SharedStorage<TileT>* shared_;
  Product const* product_;
  int32_t group_, warp_, lane_, rank_;
  StagePlace<TileT::kStages> place_;
  uint32_t buffer_ = 0;
  bool waited_ = false;
};

template <class T, class TileT, bool kGated>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_kernel(__grid_constant__ CUtensorMap const weights, __grid_constant__ CUtensorMap const tokens,
                   __grid_constant__ Product const product) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t raw[];
  auto* const shared = reinterpret_cast<SharedStorage<TileT>*>((reinterpret_cast<uintptr_t>(raw) + 1023) &
                                                               ~static_cast<uintptr_t>(1023));
  int const warp = static_cast<int>(threadIdx.x) / 32;
  bool const first_lane = threadIdx.x % 32 == 0;

  if (threadIdx.x == 0) {
    prefetch_map(weights);
    prefetch_map(tokens);
    for (int i = 0; i < TileT::kStages; ++i) {
      barrier_init(&shared->full[i], 1);
      barrier_init(&shared->empty[i], kMultiplierWarps * TileT::kCluster);
    }
    shared->queue.init((kMultiplierWarps + 1) * TileT::kCluster);
    barrier_init_fence();
  }
  if constexpr (TileT::kCluster > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }

  if (warp < 4) {
    give_registers<40>();
    if (warp == 0 && first_lane) {
      Producer<TileT, kGated>(shared, &weights, &tokens, &product).run();
    } else if (warp == 1 && cluster_rank() == 0) {
      UnitsOfGroups const units{product.groups, TileT::kTokens, TileT::kBoxRows, product.blocks, shared->units_end};
      count_units(product.groups, TileT::kTokens, product.blocks, shared->units_end);
      schedule_units<TileT::kCluster>(&shared->queue, units, product.counters,
                                      static_cast<int32_t>(gridDim.x) / TileT::kCluster);
    } else if (warp == 2) {
      wait_for_previous_kernel();
      start_next_kernel();
    }
  } else {
    take_registers<232>();
    Multiplier<T, TileT, kGated>(shared, &product).run();
  }
  // A block's shared memory must live until the other has stopped writing to it.
  if constexpr (TileT::kCluster > 1) {
    __syncwarp();
    cluster_sync();
  }
#endif
}

}  // namespace moe_infer::hopper
