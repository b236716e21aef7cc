// A warpgroup of the Hopper kernel: multiplies its 64 weight rows of each unit, applies bias, activation and residual,
// transposes through shared memory and stores.
#pragma once

#include "core/element.cuh"
#include "core/grid_dependency.cuh"
#include "gemm/activation.cuh"
#include "gemm/hopper_primitives.cuh"
#include "gemm/hopper_tile.cuh"
#include "gemm/hopper_units.cuh"

namespace moe_infer::hopper {

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

  __device__ __forceinline__ void run() {
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
  __device__ __forceinline__ void compute_narrowest(Unit const& unit) {
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

  // One instruction has at most 256 columns, and only some numbers of them: kN columns may take two.
  template <int kN>
  static constexpr int kFirst = has_mma(kN) ? kN
                                : kN == 48  ? 32
                                            : kN - 32;

  // Where two instructions multiply the same weights, these come from registers: shared memory, which then limits the
  // product, is read once for both.
  template <int kN>
  static constexpr bool kWeightsInRegisters = kFirst<kN> < kN && TileT::kCluster > 1;

  template <int kN>
  __device__ __forceinline__ void compute(Unit const& unit) {
    float sums[kN / 2] = {};
    uint32_t previous = 0;
    for (int32_t step = 0; step < product_->k_steps; ++step) {
      barrier_wait(&shared_->full[place_.index], place_.phase);
      uint32_t const weights =
          shared_address(shared_->weights[place_.index]) + static_cast<uint32_t>(group_) * 64 * kRowBytes;
      uint64_t const b = descriptor(shared_address(shared_->tokens[place_.index]));
      if constexpr (kWeightsInRegisters<kN>) {
        // Half a stage is loaded while the half before is multiplied.
        uint32_t first[2][4], second[2][4];
        load_fragments(weights, 0, first);
        multiply_fragments<kN>(first, b, sums, step > 0);
        if (step > 0) release_after<1>(previous);
        load_fragments(weights, 2, second);
        multiply_fragments<kN>(second, b + 2 * kDescriptorStep, sums, true);
        mma_wait<1>();
      } else {
        uint64_t const a = descriptor(weights);
        hold(sums);
        mma_begin();
#pragma unroll
        for (int i = 0; i < kDepth / 16; ++i) {
          multiply<kN>(a + i * kDescriptorStep, b + i * kDescriptorStep, sums, step > 0 || i > 0);
        }
        mma_commit();
        hold(sums);
        if (step > 0) release_after<1>(previous);
      }
      previous = place_.index;
      place_.next();
    }
    release_after<0>(previous);
    hold(sums);
    store<kN>(unit, sums);
  }

  // Two pieces, from `piece` on, of 16 in depth, of the warp's 16 rows of a stage's weights.
  __device__ __forceinline__ void load_fragments(uint32_t weights, int32_t piece, uint32_t (&fragments)[2][4]) const {
    int32_t const row = warp_ * 16 + lane_ % 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int32_t const chunk = (2 * (piece + i) + lane_ / 16) ^ (row % 8);  // the swizzle
      load_matrices(weights + static_cast<uint32_t>(row * kRowBytes + chunk * 16), fragments[i]);
    }
  }

  template <int kN>
  __device__ __forceinline__ static void multiply_fragments(uint32_t const (&a)[2][4], uint64_t b,
                                                            float (&sums)[kN / 2], bool add) {
    hold(sums);
    mma_begin();
    multiply<kN>(a[0], b, sums, add);
    multiply<kN>(a[1], b + kDescriptorStep, sums, true);
    mma_commit();
    hold(sums);
  }

  template <int kN, class A>
  __device__ __forceinline__ static void multiply(A const& a, uint64_t b, float (&sums)[kN / 2], bool add) {
    mma<T, kFirst<kN>>(a, b, sums, add);
    if constexpr (kFirst<kN> < kN) {
      mma<T, kN - kFirst<kN>>(a, b + (kFirst<kN> * kRowBytes >> 4), sums + kFirst<kN> / 2, add);
    }
  }

  // Once at most kPending groups of products are under way.
  template <int kPending>
  __device__ void release_after(uint32_t stage) {
    mma_wait<kPending>();
    if constexpr (TileT::kCluster == 1) {
      if (lane_ == 0) barrier_arrive(&shared_->empty[stage]);
    } else {
      if (lane_ < TileT::kCluster) barrier_arrive_at(&shared_->empty[stage], static_cast<uint32_t>(lane_));
    }
  }

  template <int kN>
  __device__ __forceinline__ void store(Unit const& unit, float (&sums)[kN / 2]) {
    if (!waited_ && !product_->after_fetch) {
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
  __device__ __forceinline__ void finish(Unit const& unit, int32_t first_channel, float (&sums)[kN / 2]) {
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
  __device__ __forceinline__ void finish_as(Unit const& unit, int32_t first_channel, T const* bias,
                                            Activation activation, float (&sums)[kN / 2]) {
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
  __device__ __forceinline__ void to_buffer(uint8_t* buffer, int first, float const (&sums)[kN / 2]) const {
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
  __device__ __forceinline__ void from_buffer(uint8_t const* buffer, Unit const& unit, int first,
                                              int32_t first_channel) const {
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
  RingPlace<TileT::kStages> place_;
  uint32_t buffer_ = 0;
  bool waited_ = false;
};

}  // namespace moe_infer::hopper
