#include "core/content_check.h"

#include <zlib.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "core/error.h"
#include "core/file_index.h"
#include "core/parallel.h"

namespace moe_infer {
namespace {

constexpr char const* kFinite = "MOE_INFER_CHECK_FINITE";
constexpr char const* kCrc = "MOE_INFER_CHECK_CRC";
constexpr uint64_t kPart = uint64_t{16} << 20U;     // for a thread; a multiple of every type's size
constexpr uint64_t kBuffer = uint64_t{256} << 10U;  // read at once; stays in a core's cache
constexpr uint64_t kNone = UINT64_MAX;

bool is_on(char const* variable) {
  char const* const text = std::getenv(variable);
  std::string const value = text == nullptr ? "" : text;
  if (value != "" && value != "0" && value != "1") {
    throw invalid(std::string("environment variable ") + variable + " must be 1 (on) or 0 (off), got '" + value + "'");
  }
  return value == "1";
}

// First of `count` values whose exponent is all ones, which means infinity or NaN; `count` if there is none.
template <class Bits>
uint64_t find_not_finite(uint8_t const* data, uint64_t count, Bits exponent) {
  auto const value = [&](uint64_t i) {
    Bits bits = 0;
    std::memcpy(&bits, data + i * sizeof(Bits), sizeof(Bits));  // the file may hold it unaligned
    return bits;
  };
  Bits bad = 0;
  for (uint64_t i = 0; i < count; ++i) {  // without a branch, so that the compiler makes vectors of it
    bad = static_cast<Bits>(bad | static_cast<Bits>((value(i) & exponent) == exponent));
  }
  uint64_t first = bad == 0 ? count : 0;
  while (first < count && (value(first) & exponent) != exponent) {
    ++first;
  }
  return first;
}

uint64_t find_not_finite(uint8_t const* data, uint64_t count, DataType dtype) {
  switch (dtype) {
    case DataType::kFloat32:
      return find_not_finite<uint32_t>(data, count, 0x7F800000U);
    case DataType::kFloat16:
      return find_not_finite<uint16_t>(data, count, 0x7C00U);
    case DataType::kBFloat16:
      return find_not_finite<uint16_t>(data, count, 0x7F80U);
  }
  return count;
}

// A value that is not finite, as Python writes it.
std::string value_text(uint8_t const* data, DataType dtype) {
  uint32_t bits = 0;
  std::memcpy(&bits, data, size_of(dtype));
  bool const wide = dtype == DataType::kFloat32;
  uint32_t const fraction = wide ? 0x007FFFFFU : dtype == DataType::kFloat16 ? 0x03FFU : 0x007FU;
  bool const negative = (bits >> (wide ? 31U : 15U)) != 0;
  return (bits & fraction) != 0 ? "nan" : negative ? "-inf" : "inf";
}

// A run of one tensor's bytes, and what was found there.
struct Part {
  CheckedTensor const* tensor = nullptr;
  uint64_t begin = 0;
  uint64_t bytes = 0;
  uLong crc = 0;
  uint64_t bad = kNone;  // element of the tensor
  std::string value;
};

class Checker {
 public:
  Checker(WeightFile const& file, ContentChecks checks) : file_(file), checks_(checks) {}

  void check(Part& part) const {
    auto const& entry = *part.tensor->entry;
    std::vector<uint8_t> buffer(part.tensor->inflated != nullptr ? 0 : std::min(part.bytes, kBuffer));
    part.crc = ::crc32(0, nullptr, 0);
    for (uint64_t done = 0; done < part.bytes; done += kBuffer) {
      auto const begin = part.begin + done;
      auto const count = std::min(kBuffer, part.bytes - done);
      uint8_t const* data = part.tensor->inflated + begin;
      if (part.tensor->inflated == nullptr) {
        file_.read_at(entry.offset + begin, buffer.data(), count);
        data = buffer.data();
      }
      if (checks_.crc) {
        part.crc = ::crc32(part.crc, data, static_cast<uInt>(count));
      }
      if (checks_.finite && part.bad == kNone) {
        look_for_bad(data, begin, count, part);
      }
    }
  }

  // Throws for the first bad part of one tensor, whose parts these are.
  void judge(Part const* parts, size_t count) const {
    auto const& entry = *parts->tensor->entry;
    if (checks_.crc && entry.header != 0 && entry.compressed == 0) {
      std::vector<uint8_t> header(entry.header);
      file_.read_at(entry.offset - entry.header, header.data(), header.size());
      auto crc = ::crc32(::crc32(0, nullptr, 0), header.data(), static_cast<uInt>(header.size()));
      for (size_t i = 0; i < count; ++i) {
        crc = ::crc32_combine(crc, parts[i].crc, static_cast<z_off_t>(parts[i].bytes));
      }
      file_.check_crc(entry, static_cast<uint32_t>(crc));
    }
    for (size_t i = 0; i < count; ++i) {
      if (parts[i].bad != kNone) {
        refuse(parts[i]);
      }
    }
  }

 private:
  static void look_for_bad(uint8_t const* data, uint64_t begin, uint64_t bytes, Part& part) {
    auto const dtype = part.tensor->entry->dtype;
    uint64_t const size = size_of(dtype);
    auto const first = find_not_finite(data, bytes / size, dtype);
    if (first < bytes / size) {
      part.bad = begin / size + first;
      part.value = value_text(data + first * size, dtype);
    }
  }

  void refuse(Part const& part) const {
    auto const& shape = part.tensor->entry->shape;
    std::vector<uint64_t> index(shape.size());
    auto rest = part.bad;
    for (size_t axis = shape.size(); axis-- > 0;) {
      index[axis] = rest % static_cast<uint64_t>(shape[axis]);
      rest /= static_cast<uint64_t>(shape[axis]);
    }
    std::string place;
    for (auto const i : index) {
      place += (place.empty() ? "" : ", ") + std::to_string(i);
    }
    auto const expert = part.tensor->stacked ? "expert " + std::to_string(index.front()) + " of tensor " : "tensor ";
    throw bad_file(file_.path() + ": " + expert + shown(part.tensor->name) + " holds " + part.value + " at [" + place +
                   "]; expected finite numbers; export the weights again");
  }

  WeightFile const& file_;
  ContentChecks checks_;
};

}  // namespace

ContentChecks content_checks() { return {is_on(kFinite), is_on(kCrc)}; }

void check_content(WeightFile const& file, std::vector<CheckedTensor> const& tensors, ContentChecks checks) {
  std::vector<Part> parts;
  for (auto const& tensor : tensors) {
    uint64_t begin = 0;
    do {  // one part even of an empty tensor: its header has a CRC
      parts.push_back({&tensor, begin, std::min(kPart, tensor.entry->bytes - begin), 0, kNone, ""});
      begin += kPart;
    } while (begin < tensor.entry->bytes);
  }
  Checker const checker(file, checks);
  for_each_parallel(parts.size(), [&](size_t i) { checker.check(parts[i]); });
  for (size_t first = 0, end = 0; first < parts.size(); first = end) {
    while (end < parts.size() && parts[end].tensor == parts[first].tensor) {
      ++end;
    }
    checker.judge(parts.data() + first, end - first);
  }
}

}  // namespace moe_infer
