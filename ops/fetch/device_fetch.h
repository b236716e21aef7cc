// Experts that the device fetches by itself, without waiting for the host: routing stays on the device, a kernel
// decides which slots they take, kernels or the copy engine (host_copy.h) copy them out of page-locked host memory,
// and the kernels that compute run those that are there while others are on their way. So a layer that streams can be
// captured in a CUDA graph.
//
// For layers whose experts lie in page-locked memory as the slots hold them, and calls that need no more experts than
// there are slots. Other calls go through ExpertCache (expert_cache.h), on the same tables: they lie on the device, and
// the host takes them for such a call and brings them back.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>

#include "core/device_memory.h"
#include "core/expert_cache.h"
#include "core/statistics.h"
#include "fetch/fetch_kernels.h"
#include "fetch/guess.h"
#include "fetch/host_copy.h"
#include "fetch/run_order.h"
#include "sublayers/sub_layer.h"

namespace moe_infer {

// Environment variable MOE_INFER_FETCH.
enum class FetchMode {
  kAuto,    // kernels copy in CUDA graphs and, without guesses, where that is as fast; otherwise the host
  kHost,    // kernels copy no more than the head (copy_head_in_block)
  kDevice,  // kernels, for every call that they can serve; a layer that they cannot serve is refused
};
// Throws Error(MOE_INFER_INVALID).
FetchMode fetch_mode_from_environment();

// Who copies what a kernel planned.
enum class Copier {
  kKernels,  // nobody waits for the host, so a CUDA graph can capture it
  kHost,     // the copy engine does, and the host enqueues it: host_copy.h
};

// Input next_router_logits of a single token: what the router of the layer that runs next makes of it.
struct NextLogits {
  void const* logits = nullptr;  // (experts); null: not given
  int32_t experts = 0;           // of that layer
  DataType dtype = DataType::kFloat32;
};

class DeviceFetch {
 public:
  // Why the device cannot fetch this cache's experts, as a part of a sentence; "": it can.
  static std::string why_not(ExpertCache const& cache);

  // `router`: the layer's, with the memory of its bias, as the layer before this one guesses by it, too.
  DeviceFetch(ExpertCache const& cache, FetchMode mode, RouterParams const& router,
              std::shared_ptr<DeviceMemory const> router_bias);

  // A call needs at most as many experts as there are slots. Enqueues the fetch of what it needs, by the rows of each
  // expert (experts). `overlap`: the kernel before and the next are of this library; the next one must follow
  // ExpertGroups::arrivals.
  void enqueue(Copier copier, int32_t const* counts, bool overlap, cudaStream_t stream) const;
  // For a single token: chooses its experts as select_experts does, and plans. Copies are then the part of who runs the
  // experts, as copy() says. Where the host copies and `next` is given, guesses for the layer that runs next, too.
  void select_and_plan(Copier copier, TokenRouter const& router, Routing const& routing, NextLogits const& next,
                       cudaStream_t stream) const;
  // At the begin of each run: so the layers before and after this one are known (run_order.h). `by_host`: it copies
  // what a kernel plans, so an expert that was fetched ahead is used. `guesses`: next_router_logits are given.
  void begin_run(bool by_host, bool guesses) const { note_run(by_host ? target_ : nullptr, guesses ? next_ : nullptr); }
  // At its end: the bus may work for the next layer.
  void fetch_ahead() const { host_copy_->fetch_ahead(); }
  ExpertCopy copy(Copier copier) const;
  // For FetchMode::kAuto, outside of CUDA graphs: by what the last calls missed.
  Copier faster_copier() const;
  bool host_can_copy() const { return host_copy_->works(); }
  // Where enqueue finds and puts experts.
  int32_t const* slot_of_expert() const { return copy_.tables.slot_of_expert; }
  int32_t const* slot_of_choice() const { return copy_.tables.slot_of_choice; }
  Arrivals const& arrivals() const { return copy_.tables.arrivals; }

  // For a call that the host drives. begin_take copies the tables as `stream` has them; when the stream is there,
  // end_take hands them to the cache; return_tables brings them back, in the order of `stream`. One call at a time.
  void begin_take(cudaStream_t stream);
  void end_take(ExpertCache* cache, cudaStream_t stream) const;
  void return_tables(ExpertCache const& cache, cudaStream_t stream);
  // The last call is over, and the cache has the tables from here on. Waits for the device. When CUDA fails, as it does
  // at the end of a process, the cache keeps those that it had.
  void hand_over(ExpertCache* cache) noexcept;

  // After a call whose enqueueing failed somewhere: of what the tables say is there, not all has come, so nothing is.
  void forget(cudaStream_t stream) const noexcept;

  // Adds what was counted here; waits for the device.
  void add_statistics(LayerStatistics* statistics) const;

 private:
  CacheTables on_host() const;  // the copy in page-locked memory
  ExpertCopy head_of_call(Copier copier) const;
  CopySource list_sources(ExpertCache const& cache);
  double seconds_saved_by_host() const;
  Guess guess_by(NextLogits const& next, GuessTarget const* target) const;

  PolicySettings policy_;
  int32_t experts_, slots_;
  int device_;
  std::shared_ptr<DeviceMemory> memory_;  // of the tables
  DeviceMemory sources_, chunks_;
  PinnedMemory staging_, recent_misses_;
  size_t shared_bytes_ = 0;
  std::unique_ptr<HostCopy> host_copy_;
  ExpertCopy copy_;
  double saved_ = 0;  // seconds that each miss takes the host less than kernels; measured for FetchMode::kAuto
  std::shared_ptr<GuessTarget const> target_;
  std::shared_ptr<NextLayer> next_ = std::make_shared<NextLayer>();
};

}  // namespace moe_infer
