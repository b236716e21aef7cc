// Fetching ahead: while the bus has nothing else to do, an expert that the next layer may miss is copied, piece by
// piece, into a place beside all slots. When that layer has chosen, the guess is over. If it was right, what has come
// moves on into the slot, on the device, and the rest follows from the host; if it was wrong, nothing was evicted for
// it.
//
// The host enqueues the pieces while it waits for a layer's choice, few at a time: what is needed then stands behind
// those few at most. Layers whose guesses are mostly wrong get no more of them, and are watched.
//
// One for all layers of a device: one bus, one place, one guess. Layers of several sessions may overwrite each other's
// guesses, which then come to nothing. Every access to the place is ordered by copy_stream().
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "core/device_memory.h"
#include "fetch/copy_source.h"
#include "fetch/fetch_tables.h"
#include "fetch/flag_writer.h"

namespace moe_infer {

// Of one layer's experts.
struct AheadCounters {
  int64_t used = 0;  // guessed experts of which something had come when they were needed
  int64_t wasted = 0;
  int64_t bytes_used = 0;  // that had come
  int64_t bytes_wasted = 0;
};

class FetchAhead {
 public:
  // That of the current device. Throws Error(MOE_INFER_CUDA).
  static std::shared_ptr<FetchAhead> of_device();

  FetchAhead();

  // False: the driver cannot write flags in a stream, and neither this nor HostCopy can be used.
  bool works() const { return works_; }
  // On which experts that are needed now are copied, too.
  cudaStream_t copy_stream() const { return copies_.get(); }
  FlagWriter const& flags() const { return flags_; }

  // A layer for whose experts guesses may be made. Gives its number, never given twice. `source` stays until leave.
  int64_t enter(CopySource const* source);
  void leave(int64_t layer) noexcept;
  AheadCounters counters(int64_t layer) const;

  // The layer has chosen and misses these: its guess is over. If it is among them, enqueues all that brings it into its
  // slot and raises the flag. Gives its place in `items`, -1: it is not among them. Throws Error(MOE_INFER_CUDA).
  int32_t end_guess(int64_t layer, FetchItem const* items, int32_t count);
  // After the copies that are needed now have been enqueued. A layer that has left, or expert -1: no guess.
  void begin_guess(int64_t layer, int32_t expert);
  // Enqueues the next pieces, if there are few on their way. Does not wait, for nobody. Throws Error(MOE_INFER_CUDA).
  void feed();

  // What is enqueued on `stream` from now on waits for all copies so far. Throws Error(MOE_INFER_CUDA).
  void order_before(cudaStream_t stream) const;

 private:
  struct Layer {
    CopySource const* source = nullptr;
    double right = 0.5;  // of its guesses, the last ones count most
    AheadCounters counters;
  };

  void send_piece();
  void move_on(CopySource const& source, FetchItem const& item);
  void drop_guess();
  bool make_place(uint64_t bytes);

  FlagWriter flags_;
  Stream copies_;  // from the host
  Stream moves_;   // from the place into slots
  Event arrived_, rest_arrived_, moved_;
  PinnedMemory arrived_pieces_;  // (1) uint32: pieces that have come
  bool works_ = false;

  mutable std::mutex mutex_;  // guards what follows
  std::map<int64_t, Layer> layers_;
  int64_t last_id_ = 0;
  DeviceMemory place_;
  uint64_t place_bytes_ = 0;
  bool no_place_ = false;  // the GPU had no memory for it
  uint32_t sent_pieces_ = 0;
  // The guess.
  int64_t guessed_layer_ = 0;  // 0: none
  int32_t guessed_expert_ = -1;
  bool fetches_ = false;  // or only sees whether it is right
  size_t part_ = 0;       // of the expert: parts before this have been sent,
  uint64_t offset_ = 0;   // and so many bytes of this one
};

}  // namespace moe_infer
