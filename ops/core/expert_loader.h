// Way of a layer's experts from host memory or their file into slots on the device.
//
// Copies are enqueued on a stream of the loader's own; parts that the file holds in another type or row order go
// through a staging buffer on the device and a kernel on the pack stream. Nothing waits on the host, except for weights
// that are not pinned: those are read into the ring of host_ring.h, ahead of the expert that is being copied.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "core/copy_batch.h"
#include "core/device_memory.h"
#include "core/expert_store.h"
#include "core/host_ring.h"

namespace moe_infer {

class ExpertLoader {
 public:
  // Allocates staging on the current device if the weights need it. store->load was called.
  ExpertLoader(std::shared_ptr<ExpertStore> store, int32_t expert_count, SlotLayout layout, DataType dtype);
  ~ExpertLoader();  // waits for what was enqueued
  ExpertLoader(ExpertLoader const&) = delete;
  ExpertLoader& operator=(ExpertLoader const&) = delete;

  // The loads of one call: one at a time for a loader, on one thread.
  class Loads {
   public:
    // `experts` in the order in which load() will be called for them. What is not pinned of them is read from now on.
    Loads(ExpertLoader& loader, std::vector<int32_t> const& experts);
    Loads(Loads const&) = delete;
    Loads& operator=(Loads const&) = delete;

    // Enqueues the expert's copies into `slot`, after what `free` stands for, and records `ready` behind them. Returns
    // the bytes. After an exception nothing is on its way.
    uint64_t load(int32_t expert, uint8_t* slot, Event const& free, Event const& ready);

   private:
    bool is_read(int32_t expert) const;
    void submit_reads();
    uint64_t copy_read(int32_t expert, uint8_t* slot);

    ExpertLoader& loader_;
    std::optional<HostRing::Session> session_;  // while reads are left
    size_t submitted_ = 0, taken_ = 0;          // of loader_.reads_
  };

  // What weights that are not pinned go through; null: all are.
  std::shared_ptr<HostRing> const& ring() const { return ring_; }
  // What is loaded from now on comes after what is enqueued on `stream` so far.
  void order_behind(cudaStream_t stream) const;
  void finish() const;         // waits until all loads are done; throws Error(MOE_INFER_CUDA)
  void wait() const noexcept;  // the same after an error that is told already

 private:
  // One copy from the host: `count` elements of `piece` from element `first` on.
  struct Transfer {
    ExpertPiece const* piece = nullptr;
    int32_t expert = 0;
    int64_t first = 0;
    int64_t count = 0;
    bool direct = false;  // type and order are the slot's
    uint64_t offset() const { return static_cast<uint64_t>(first) * size_of(piece->dtype); }
    uint64_t bytes() const { return static_cast<uint64_t>(count) * size_of(piece->dtype); }
  };

  bool is_direct(ExpertPiece const& piece) const { return piece.row_stride == 1 && piece.dtype == dtype_; }
  void list_transfers(int32_t expert, uint64_t most_direct_bytes, uint64_t most_staged_bytes,
                      std::vector<Transfer>* transfers) const;
  uint64_t copy_pinned(int32_t expert, uint8_t* slot);
  void send(Transfer const& transfer, void const* source, uint8_t* slot);

  std::shared_ptr<ExpertStore> store_;
  SlotLayout layout_;
  DataType dtype_;
  int device_;
  DeviceMemory staging_;
  uint64_t staging_bytes_ = 0;  // of each half
  Stream copy_stream_, pack_stream_;
  CopyBatch batch_;                // of what the copy stream gets next
  Event copied_;                   // the last copy that was enqueued
  Event before_;                   // order_behind
  Event staged_[2], unstaged_[2];  // half of the staging buffer is full, is read
  uint64_t staging_turn_ = 0;
  std::shared_ptr<HostRing> ring_;   // only if some expert is not pinned
  std::vector<Transfer> transfers_;  // of the pinned expert that is loaded
  std::vector<Transfer> reads_;      // of Loads
};

}  // namespace moe_infer
