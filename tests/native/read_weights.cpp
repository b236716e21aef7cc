// Answers questions about weight files, one a line, so that tests see what the C entry does not show.
//
//   index PATH                                   every tensor
//   read PATH                                    every tensor with its data, inflated
//   experts PATH PREFIX EXPERTS HIDDEN_SIZE      every expert of a T5_FF layer, packed as the kernels read it
//   cut BYTES PATH PREFIX EXPERTS HIDDEN_SIZE    the same, but the file is cut to BYTES once the layer is loaded
//
// Answer: "ok" and a JSON object, or "error STATUS" and the message; always one line. `-` stands for an empty prefix.
#include <unistd.h>
#include <zlib.h>

#include <cstdio>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/expert_store.h"
#include "core/host_memory.h"
#include "core/weight_file.h"
#include "place_rows.h"

namespace moe_infer {
namespace {

using Bytes = std::vector<uint8_t>;

std::string json_text(std::string const& text) {
  std::string out = "\"";
  for (char const c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == '"' || c == '\\') {
      char escape[8];
      std::snprintf(escape, sizeof(escape), "\\u%04x", static_cast<unsigned char>(c));
      out += escape;
    } else {
      out += c;
    }
  }
  return out + "\"";
}

std::string shape_list(std::vector<int64_t> const& shape) {
  std::string out;
  for (auto const size : shape) {
    out += (out.empty() ? "" : ",") + std::to_string(size);
  }
  return "[" + out + "]";
}

std::string described(DataType dtype, std::vector<int64_t> const& shape, Bytes const& data) {
  // One pointer that is never null: an empty tensor has none.
  uint8_t const none = 0;
  auto const crc = crc32(0, data.empty() ? &none : data.data(), static_cast<uInt>(data.size()));
  return "[\"" + std::string(name_of(dtype)) + "\"," + shape_list(shape) + "," + std::to_string(crc) + "]";
}

std::string read_all(std::istream& words, bool data_too) {
  std::string path;
  words >> path;
  auto const file = WeightFile::open(path);
  std::string out;
  for (auto const& [name, entry] : file->tensors()) {
    Bytes data(data_too ? entry.bytes : 0);
    if (!data_too) {
      // only what the index says
    } else if (entry.compressed != 0) {
      file->inflate(entry, data.data());
    } else {
      file->read_at(entry.offset, data.data(), data.size());
    }
    out += (out.empty() ? "" : ",") + json_text(name) + ":" + described(entry.dtype, entry.shape, data);
  }
  return "{\"digest\":" + json_text(file->digest()) + ",\"tensors\":{" + out + "}}";
}

Bytes packed(ExpertStore const& store, int32_t expert, int32_t tensor, ExpertTensor const& shape, DataType* dtype) {
  Bytes out;
  for (auto const& piece : store.pieces(expert)) {
    if (piece.tensor != tensor) {
      continue;
    }
    *dtype = piece.dtype;
    auto const row = static_cast<size_t>(piece.columns) * size_of(piece.dtype);
    out.resize(static_cast<size_t>(shape.rows) * row);
    place_rows(store, piece, out.data());
  }
  return out;
}

std::string read_experts(std::istream& words, bool cut) {
  LayerConfig config;
  off_t bytes = 0;
  if (cut) {
    words >> bytes;
  }
  config.sublayer_type = "T5_FF";
  words >> config.weight_file >> config.weight_prefix >> config.expert_count >> config.hidden_size;
  if (config.weight_prefix == "-") {
    config.weight_prefix.clear();
  }
  auto const store = ExpertStore::open(config, 0);
  auto const other = ExpertStore::open(config, store->d_model());
  store->load();
  other->load(/*pin=*/false);
  store->load();
  if (cut && ::truncate(config.weight_file.c_str(), bytes) != 0) {
    throw invalid("truncate failed");
  }
  bool shared = true;
  std::string out;
  for (int32_t e = 0; e < config.expert_count; ++e) {
    std::string tensors;
    for (size_t t = 0; t < store->tensors().size(); ++t) {
      auto const& tensor = store->tensors()[t];
      DataType dtype = DataType::kFloat32;
      auto const data = packed(*store, e, static_cast<int32_t>(t), tensor, &dtype);
      auto const shape =
          tensor.vector ? std::vector<int64_t>{tensor.columns} : std::vector<int64_t>{tensor.rows, tensor.columns};
      tensors += (tensors.empty() ? "" : ",") + json_text(tensor.name) + ":" + described(dtype, shape, data);
    }
    for (size_t i = 0; i < store->pieces(e).size(); ++i) {
      shared = shared && store->pieces(e)[i].data == other->pieces(e)[i].data;
    }
    out += (out.empty() ? "" : ",") + ("{" + tensors + "}");
  }
  return "{\"d_model\":" + std::to_string(store->d_model()) + ",\"shared\":" + (shared ? "true" : "false") +
         ",\"pinned\":" + std::to_string(store->pinned_bytes()) + ",\"note\":" + json_text(store->pinning_note()) +
         ",\"experts\":[" + out + "]}";
}

std::string answer(std::string const& line) {
  std::istringstream words(line);
  std::string command;
  words >> command;
  try {
    bool const cut = command == "cut";
    return "ok " + (cut || command == "experts" ? read_experts(words, cut) : read_all(words, command == "read"));
  } catch (Error const& error) {
    std::string message = error.what();
    for (char& c : message) {
      c = c == '\n' ? ' ' : c;
    }
    return "error " + std::to_string(error.status()) + " " + message;
  }
}

}  // namespace
}  // namespace moe_infer

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    std::cout << moe_infer::answer(line) << std::endl;
  }
}
