// What goes over the bus to one device: the experts that layers need now and, while there are none, one that the next
// layer may need (fetching ahead).
//
// The guessed expert is copied piece by piece into a place beside all slots. When its layer has chosen, the guess is
// over. If it was right, what has come moves on into the slot, on the device, and the rest follows from the host; if it
// was wrong, nothing was evicted for it. Pieces are enqueued by a host that waits for a layer's choice, few at a time:
// what is needed then stands behind those few at most. Layers whose guesses are mostly wrong get no more of them, and
// are watched.
//
// One for all layers of a device, so one place and one guess: sessions that run at the same time may take them from
// each other, and the guess then comes to nothing.
//
// The copy stream must never wait for what runs on multiprocessors, as a copy inside of the device may: kernels that
// wait for copies can occupy them all. So the host asks whether the place is free, and a move is ordered before the
// kernels of its own call.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "core/copy_batch.h"
#include "core/device_memory.h"
#include "fetch/copy_source.h"
#include "fetch/fetch_tables.h"
#include "fetch/flag_writer.h"

namespace moe_infer {

// Of one layer's experts.
struct AheadCounters {
  int64_t used = 0;  // guessed experts of which something had been sent when they were needed
  int64_t wasted = 0;
  int64_t bytes_used = 0;  // that had come, or were on their way
  int64_t bytes_wasted = 0;
};

class ExpertBus {
 public:
  // That of the current device. Throws Error(MOE_INFER_CUDA).
  static std::shared_ptr<ExpertBus> of_device();

  ExpertBus();

  // False: the driver cannot write flags in a stream, and the rest is of no use.
  bool works() const { return works_; }

  // A layer whose experts may be copied. Gives its number, never given twice. `source` stays until leave.
  int64_t enter(CopySource const* source);
  void leave(int64_t layer) noexcept;
  AheadCounters counters(int64_t layer) const;

  // Enqueues the copies of what a layer needs now, followed by the rise of the slots' flags. The first of the items is
  // there up to the source's head_bytes. A guessed expert among them comes in part on `stream`, before the kernels of
  // the call. Throws Error(MOE_INFER_CUDA).
  void bring(int64_t layer, FetchItem const* items, int32_t count, cudaStream_t stream);
  // The layer may need this expert next. One that has left, or expert -1: there is no guess.
  void guess(int64_t layer, int32_t expert);
  // Enqueues the next pieces of the guess if there are few on their way. Waits for nobody. Throws
  // Error(MOE_INFER_CUDA).
  void feed();

  // What is enqueued on `stream` from now on waits for all copies so far. Throws Error(MOE_INFER_CUDA).
  void order_before(cudaStream_t stream) const;

 private:
  struct Layer {
    CopySource const* source = nullptr;
    double right = 0.5;  // of its guesses, the last ones count most
    AheadCounters counters;
  };

  // A place in an expert: `offset` bytes into a part.
  struct Place {
    size_t part = 0;
    uint64_t offset = 0;
  };

  void copy(CopySource const& source, FetchItem const& item, Place from, bool is_last);
  void end_batch();
  int32_t find_guess(int64_t layer, FetchItem const* items, int32_t count);
  void move(Layer* own, FetchItem const& item, cudaStream_t stream);
  void send_piece(CopySource const& source);
  uint64_t sent_of(CopySource const& source, size_t part) const;
  uint64_t sent_of(CopySource const& source) const;
  void drop_guess();
  bool place_is_free() const;
  bool make_place(uint64_t bytes);

  FlagWriter flags_;
  CopyBatch batch_;
  Stream copies_;
  Event arrived_;                // a moment of the copy stream
  Event moved_;                  // the last expert that was right has left the place
  PinnedMemory arrived_pieces_;  // (1) uint32: pieces that have come
  bool works_ = false;

  mutable std::mutex mutex_;  // guards what follows
  std::map<int64_t, Layer> layers_;
  int64_t last_id_ = 0;
  DeviceMemory place_;
  uint64_t place_bytes_ = 0;
  bool has_no_room_ = false;  // the GPU had no memory for the place
  uint32_t sent_pieces_ = 0;
  // The guess.
  int64_t guessed_layer_ = 0;  // 0: none
  int32_t guessed_expert_ = -1;
  bool fetches_ = false;  // or only sees whether it is right
  Place sent_;            // what comes before has been sent
};

}  // namespace moe_infer
