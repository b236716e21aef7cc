// The thread of the Hopper kernel that copies both operands into the ring of stages.
#pragma once

#include "core/grid_dependency.cuh"
#include "fetch/arrivals.cuh"
#include "gemm/hopper_primitives.cuh"
#include "gemm/hopper_tile.cuh"
#include "gemm/hopper_units.cuh"

namespace moe_infer::hopper {

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
    wait_for_weights(unit);
    for (int32_t step = 0; step < early; ++step) copy_weights(unit, step);
    if (!product_->after_fetch) wait_for_previous_kernel();

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
      wait_for_weights(unit);
    }
  }

 private:
  // Steps before the end of a unit: a claim takes some microseconds, in which the stages that are full are worked on.
  // Earlier was slower.
  static constexpr int32_t kAskAhead = 5;

  __device__ void ask_for_unit() {
    if (rank_ == 0) barrier_arrive(&shared_->queue.wanted);
  }

  // Experts may be on their way; the copy engine must see what another multiprocessor has stored.
  __device__ void wait_for_weights(Unit const& unit) {
    if (product_->groups.arrivals.there == nullptr || unit.rows == 0) return;
    wait_for_expert(product_->groups.arrivals, unit.slot, kAllThere);
    asm volatile("fence.proxy.async.global;" ::: "memory");
  }

  // Of the input, for a unit; each block of the cluster copies every second one.
  __device__ static int32_t boxes_of(Unit const& unit) { return (unit.rows + TileT::kBoxRows - 1) / TileT::kBoxRows; }

  // First of the sixteen-row pieces of the weights that this block works on.
  __device__ int32_t sixteens_of(Unit const& unit) const {
    return (unit.block * TileT::kCluster + static_cast<int32_t>(rank_)) * (kWeightRows / 16);
  }

  __device__ void copy_weights(Unit const& unit, int32_t step) {
    uint32_t const stage = weights_place_.index;
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
    uint32_t const stage = tokens_place_.index;
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
  RingPlace<TileT::kStages> weights_place_, tokens_place_;
};

}  // namespace moe_infer::hopper
