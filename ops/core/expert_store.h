// Host side of the experts of one layer: where each expert's tensors lie in host memory.
//
// The file is mapped once for a process, whatever the number of sessions; deflated members are inflated once. Part of
// the host memory is pinned, up to MOE_INFER_PINNED_BYTES in the whole process, so that the copy engine reads it at
// the bus's speed; what is not pinned is copied from pageable memory through the cache's staging buffers.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/data_type.h"
#include "core/layer_config.h"
#include "core/weight_file.h"
#include "sublayers/sub_layer.h"

namespace moe_infer {

// One contiguous run of rows of an expert's packed tensor as the file holds it.
struct ExpertPiece {
  void const* data = nullptr;  // host
  DataType dtype = DataType::kFloat32;
  int64_t rows = 0;
  int64_t columns = 0;
  int32_t tensor = 0;      // index into SubLayer::tensors
  int32_t first_row = 0;   // of the packed tensor
  int32_t row_stride = 1;  // 2 where two parts alternate
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

  // Makes the data of all pieces readable (inflates deflated members) and pins what the bound allows. Called before
  // the first fetch, not for checks. Idempotent, thread-safe.
  void load();
  uint64_t pinned_bytes() const;
  bool is_pinned(int32_t expert) const;

 private:
  struct Source;
  std::shared_ptr<Source> source_;
  int64_t d_model_ = 0;
  std::vector<ExpertTensor> tensors_;
  std::vector<std::vector<ExpertPiece>> pieces_;
  std::string digest_, path_;
};

}  // namespace moe_infer
