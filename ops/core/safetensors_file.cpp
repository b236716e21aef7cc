// Rules and texts are those of moe_infer/weights/safetensors_header.py.
#include "core/safetensors_file.h"

#include <simdjson.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <set>
#include <string_view>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/file_index.h"

namespace moe_infer {
namespace {

using simdjson::dom::array;
using simdjson::dom::element;
using simdjson::dom::object;

constexpr uint64_t kLengthBytes = 8;

uint64_t read_length(WeightFile const& file) {
  std::array<uint8_t, kLengthBytes> bytes{};
  file.read_at(0, bytes.data(), bytes.size());
  uint64_t length = 0;
  for (size_t i = bytes.size(); i-- > 0;) {
    length = length << 8U | bytes[i];
  }
  return length;
}

uint64_t check_length(WeightFile const& file) {
  if (file.size() < kLengthBytes + 2) {
    throw bad_file(file.path() + " has " + std::to_string(file.size()) +
                   " bytes; a safetensors file has at least 10; it is truncated, copy or write it again");
  }
  auto const length = read_length(file);
  if (length > file.size() - kLengthBytes) {
    throw bad_file(file.path() + ": the safetensors header has " + std::to_string(length) +
                   " bytes by its length field, but only " + std::to_string(file.size() - kLengthBytes) +
                   " follow; the file is truncated or no safetensors file, copy or write it again");
  }
  if (length > kMaxIndexBytes) {
    throw bad_file(file.path() + ": the safetensors header has " + std::to_string(length) + " bytes; at most " +
                   std::to_string(kMaxIndexBytes) + " are allowed; split the file");
  }
  return length;
}

Error not_unique(std::string const& where, std::string_view name) {
  return bad_file(where + ": " + shown(std::string(name)) +
                  " is twice in the safetensors header; names must be unique, write the file again");
}

void check_metadata(std::string const& where, element value) {
  object texts;
  bool good = value.get(texts) == simdjson::SUCCESS;
  std::set<std::string_view> names;
  if (good) {
    for (auto const [key, text] : texts) {
      if (!names.insert(key).second) {
        throw not_unique(where, key);
      }
      good = good && text.is_string();
    }
  }
  if (!good) {
    throw bad_file(where + ": '__metadata__' must map texts to texts; write the file again");
  }
}

std::vector<int64_t> read_numbers(std::string const& where, std::string const& name, char const* what, element value) {
  std::vector<int64_t> numbers;
  array list;
  bool good = value.get(list) == simdjson::SUCCESS;
  if (good) {
    for (auto const item : list) {
      uint64_t number = 0;
      // Not get<uint64_t>: by that, 1.0 would be an error as well, but a large one of another sort.
      good = good && (item.is_uint64() || item.is_int64()) && item.get(number) == simdjson::SUCCESS &&
             number <= kMaxTensorBytes;
      numbers.push_back(good ? static_cast<int64_t>(number) : 0);
    }
  }
  if (!good) {
    throw bad_file(where + ": " + what + " of tensor " + shown(name) + " must be a list of integers from 0 to " +
                   std::to_string(kMaxTensorBytes) + "; the header is damaged, write the file again");
  }
  return numbers;
}

DataType read_dtype(std::string const& where, std::string const& name, element value) {
  std::string_view code;
  if (value.get(code) == simdjson::SUCCESS) {
    if (code == "F32") {
      return DataType::kFloat32;
    }
    if (code == "F16") {
      return DataType::kFloat16;
    }
    if (code == "BF16") {
      return DataType::kBFloat16;
    }
  }
  auto const found = value.is_string() ? std::string(code) : std::string("no text");
  throw bad_file(where + ": tensor " + shown(name) + " has type " + shown(found) +
                 "; expected F32, F16 or BF16; convert the weights");
}

struct Description {
  element dtype, shape, offsets;
};

Description read_description(std::string const& where, std::string const& name, element value) {
  std::optional<element> dtype, shape, offsets;
  std::string found;
  object fields;
  bool good = value.get(fields) == simdjson::SUCCESS;
  if (good) {
    for (auto const [key, field] : fields) {
      auto* const slot = key == "dtype" ? &dtype : key == "shape" ? &shape : key == "data_offsets" ? &offsets : nullptr;
      found += (found.empty() ? "" : ", ") + std::string(key);
      if (slot == nullptr) {
        good = false;
      } else if (*slot) {
        throw not_unique(where, key);
      } else {
        *slot = field;
      }
    }
  }
  if (!good || !dtype || !shape || !offsets) {
    throw bad_file(where + ": tensor " + shown(name) + " is described by " + shown(found) +
                   "; expected exactly dtype, shape and data_offsets; write the file again");
  }
  return {*dtype, *shape, *offsets};
}

TensorEntry read_tensor(std::string const& where, std::string const& name, element value, uint64_t data_begin) {
  auto const description = read_description(where, name, value);
  TensorEntry entry;
  entry.dtype = read_dtype(where, name, description.dtype);
  entry.shape = read_numbers(where, name, "shape", description.shape);
  auto const offsets = read_numbers(where, name, "data_offsets", description.offsets);
  if (offsets.size() != 2) {
    throw bad_file(where + ": tensor " + shown(name) + " has " + std::to_string(offsets.size()) +
                   " data_offsets; expected 2, begin and end; write the file again");
  }
  entry.bytes = tensor_bytes(where, name, entry.dtype, entry.shape);
  // Both are below 2^63, so neither the difference nor the sum overflows.
  if (offsets[1] < offsets[0] || static_cast<uint64_t>(offsets[1] - offsets[0]) != entry.bytes) {
    throw bad_file(where + ": tensor " + shown(name) + " has " + std::to_string(offsets[1] - offsets[0]) +
                   " bytes (data_offsets " + std::to_string(offsets[0]) + " to " + std::to_string(offsets[1]) +
                   "), but shape " + shape_text(entry.shape) + " of " + name_of(entry.dtype) + " needs " +
                   std::to_string(entry.bytes) + "; the header is damaged, write the file again");
  }
  entry.offset = data_begin + static_cast<uint64_t>(offsets[0]);
  return entry;
}

std::map<std::string, TensorEntry> read_header(std::string const& where, object fields, uint64_t data_begin) {
  std::map<std::string, TensorEntry> tensors;
  bool metadata = false;
  for (auto const [key, value] : fields) {
    std::string const name(key);
    if (name == "__metadata__") {
      if (std::exchange(metadata, true)) {
        throw not_unique(where, name);
      }
      check_metadata(where, value);
      continue;
    }
    if (tensors.count(name) != 0) {
      throw not_unique(where, name);
    }
    tensors.emplace(name, read_tensor(where, name, value, data_begin));
  }
  return tensors;
}

}  // namespace

SafetensorsFile::SafetensorsFile(std::string const& path) : WeightFile(path) {
  auto const length = check_length(*this);
  simdjson::padded_string header(length);
  read_at(kLengthBytes, header.data(), length);
  set_digest(reinterpret_cast<uint8_t const*>(header.data()), length);
  if (length == 0 || header.data()[0] != '{') {
    throw bad_file(path + ": the safetensors header begins with " +
                   shown(std::string(header.data(), std::min<uint64_t>(length, 1))) +
                   "; expected '{'; this is no safetensors file, write it again");
  }
  simdjson::dom::parser parser;
  object fields;
  auto const failed = parser.parse(header).get(fields);
  if (failed != simdjson::SUCCESS) {
    throw bad_file(path + ": the safetensors header is not JSON in UTF-8 (" + simdjson::error_message(failed) +
                   "); the file is damaged, copy or write it again");
  }
  auto const data_begin = kLengthBytes + length;
  tensors_ = read_header(path, fields, data_begin);
  std::vector<Span> spans;
  for (auto const& [name, entry] : tensors_) {
    spans.push_back({entry.offset, entry.offset + entry.bytes, name});
  }
  check_layout(path, std::move(spans), data_begin, size_, /*holes=*/false);
}

void SafetensorsFile::inflate(TensorEntry const& /*entry*/, void* /*out*/) const {
  throw Error(MOE_INFER_INTERNAL, path() + ": tensors of a safetensors file are never deflated");
}

}  // namespace moe_infer
