// Host side of the experts of one layer: where each expert's tensors lie in host memory.
//
// The file is opened once for a process, whatever the number of sessions; deflated members are inflated once
// (expert_source.h). Up to MOE_INFER_PINNED_BYTES of weights in the whole process are held in pinned memory, which the
// copy engine reads at the bus's speed; what is not pinned is read from the file, or from what was inflated, through
// the ring of host_ring.h.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/data_type.h"
#include "core/layer_config.h"
#include "core/weight_file.h"
#include "sublayers/sub_layer.h"

namespace moe_infer {

class ExpertSource;

// One contiguous run of rows of an expert's packed tensor as the file holds it.
struct ExpertPiece {
  // Host memory, not aligned to its type. To be read only while the expert is_pinned(); otherwise by read(). Null
  // before load() where the file has it deflated.
  void const* data = nullptr;
  DataType dtype = DataType::kFloat32;
  int64_t rows = 0;
  int64_t columns = 0;
  int32_t tensor = 0;        // index into SubLayer::tensors
  int32_t first_row = 0;     // of the packed tensor
  int32_t row_stride = 1;    // 2 where two parts alternate
  uint64_t file_offset = 0;  // of the bytes in the file, where it has them stored
  uint64_t bytes() const { return static_cast<uint64_t>(rows * columns) * size_of(dtype); }
};

class ExpertStore {
 public:
  // Opens the file and checks that it holds exactly the experts that `config` describes: missing and surplus experts,
  // shapes, types, digest. Reads no weights. Throws Error(MOE_INFER_FILE or MOE_INFER_INVALID).
  // d_model 0: taken from the file.
  static std::shared_ptr<ExpertStore> open(LayerConfig const& config, int64_t d_model);

  int64_t d_model() const { return d_model_; }
  std::vector<ExpertTensor> const& tensors() const { return tensors_; }
  std::vector<ExpertPiece> const& pieces(int32_t expert) const { return pieces_[static_cast<size_t>(expert)]; }
  std::string const& digest() const { return digest_; }
  std::string const& path() const { return path_; }
  bool unchanged() const;

  // Makes the data of all pieces readable (inflates deflated members), checks the weights themselves if the environment
  // asks for it (content_check.h) and, if wanted, pins what the bound allows. Called before the first fetch, not for
  // checks. Idempotent, thread-safe. Throws when the file is no longer the one that was opened. A layer that copies
  // every expert to the device once should not pin: that takes longer than such a copy.
  void load(bool pin = true);
  // Copies bytes of a piece, pinned or not. Throws Error(MOE_INFER_FILE) when the file has shrunk or cannot be read.
  // After load(); thread-safe.
  void read(ExpertPiece const& piece, uint64_t offset, void* out, uint64_t bytes) const;
  uint64_t pinned_bytes() const;  // of the file, for all layers that use it
  bool is_pinned(int32_t expert) const;
  // Why part of the weights is not pinned, as a sentence for a log; "" when nothing is to be said.
  std::string pinning_note() const;

 private:
  // The file's tensor behind a piece, and where in it the piece begins.
  struct Place {
    std::string name;
    uint64_t offset = 0;
  };

  void check_content();
  void add_stacked(LayerConfig const& config);
  void add_separate(LayerConfig const& config);
  void add_piece(int32_t expert, ExpertPiece piece, Place place);
  void pin_what_fits();

  std::shared_ptr<ExpertSource> source_;
  int64_t d_model_ = 0;
  std::vector<ExpertTensor> tensors_;
  std::vector<std::vector<ExpertPiece>> pieces_;
  std::vector<std::vector<Place>> places_;
  std::string digest_, path_;
  bool stacked_ = false;
  mutable std::mutex mutex_;
  bool pinned_ = false;
};

}  // namespace moe_infer
