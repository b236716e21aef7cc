// Rules and texts are those of moe_infer/weights/npy_header.py.
#include "core/npy_header.h"

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <utility>

#include "core/error.h"
#include "core/file_index.h"

namespace moe_infer {
namespace {

constexpr std::array<uint8_t, 6> kMagic{0x93, 'N', 'U', 'M', 'P', 'Y'};
constexpr uint64_t kMaxHeader = 65'536;  // one for a plain array has 128
constexpr size_t kMostDigits = 19;

// numpy knows no bfloat16; what ml_dtypes adds is saved as two opaque bytes.
constexpr std::array<std::pair<char const*, DataType>, 6> kTypes{{{"<f4", DataType::kFloat32},
                                                                  {"<f2", DataType::kFloat16},
                                                                  {"|V2", DataType::kBFloat16},
                                                                  {"<V2", DataType::kBFloat16},
                                                                  {"V2", DataType::kBFloat16},
                                                                  {"bfloat16", DataType::kBFloat16}}};

bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
bool is_digit(char c) { return c >= '0' && c <= '9'; }

// Reads {'key': value, ...} with three entries; every function returns nothing when the text is not of its form.
class DictReader {
 public:
  explicit DictReader(std::string const& text) : text_(text) {}

  std::optional<std::map<std::string, std::string>> read() {
    std::map<std::string, std::string> fields;
    if (!take('{')) {
      return std::nullopt;
    }
    for (int i = 0; i < 3; ++i) {
      auto const key = i == 0 || take(',') ? quoted() : std::nullopt;
      auto const text = key && take(':') ? value() : std::nullopt;
      if (!text || !fields.emplace(key->substr(1), *text).second) {
        return std::nullopt;
      }
    }
    take(',');
    if (!take('}')) {
      return std::nullopt;
    }
    skip_spaces();
    return position_ == text_.size() ? std::optional(fields) : std::nullopt;
  }

 private:
  void skip_spaces() {
    while (position_ < text_.size() && is_space(text_[position_])) {
      ++position_;
    }
  }
  bool take(char character) {
    skip_spaces();
    if (position_ < text_.size() && text_[position_] == character) {
      ++position_;
      return true;
    }
    return false;
  }
  bool take_word(std::string const& word) {
    if (text_.compare(position_, word.size(), word) != 0) {
      return false;
    }
    position_ += word.size();
    return true;
  }
  // A text with its first quote (so that it differs from a word), without its last. No escapes, no quotes inside.
  std::optional<std::string> quoted() {
    skip_spaces();
    if (position_ == text_.size() || (text_[position_] != '\'' && text_[position_] != '"')) {
      return std::nullopt;
    }
    auto const end = text_.find_first_of("'\"\\", position_ + 1);
    if (end == std::string::npos || text_[end] != text_[position_]) {
      return std::nullopt;
    }
    auto result = "'" + text_.substr(position_ + 1, end - position_ - 1);
    position_ = end + 1;
    return result;
  }
  std::optional<std::string> value() {
    if (auto text = quoted()) {
      return text;
    }
    for (std::string const word : {"True", "False"}) {
      if (take_word(word)) {
        return word;
      }
    }
    if (position_ == text_.size() || text_[position_] != '(') {
      return std::nullopt;
    }
    auto const end = text_.find(')', position_);
    if (end == std::string::npos) {
      return std::nullopt;
    }
    auto result = text_.substr(position_, end + 1 - position_);
    position_ = end + 1;
    return result;
  }

  std::string const& text_;
  size_t position_ = 0;
};

// "()", "(2,)", "(2, 3)" or "(2, 3,)".
std::optional<std::vector<std::string>> parse_shape(std::string const& text) {
  if (text.size() < 2 || text.front() != '(' || text.back() != ')') {
    return std::nullopt;
  }
  std::vector<std::string> sizes;
  bool need_comma = false;
  size_t commas = 0;
  for (size_t i = 1; i + 1 < text.size();) {
    if (is_space(text[i])) {
      ++i;
    } else if (text[i] == ',' && need_comma) {
      need_comma = false;
      ++commas;
      ++i;
    } else if (is_digit(text[i]) && !need_comma) {
      auto const begin = i;
      while (is_digit(text[i])) {
        ++i;
      }
      sizes.push_back(text.substr(begin, i - begin));
      need_comma = true;
      if (sizes.back().size() > kMostDigits) {
        return std::nullopt;
      }
    } else {
      return std::nullopt;
    }
  }
  // (2) is a number in Python, not a tuple.
  return sizes.size() == 1 && commas == 0 ? std::nullopt : std::optional(sizes);
}

std::string hint(std::string const& descr) {
  if (!descr.empty() && descr.back() == 'O') {
    return " (Python objects, which would have to be unpickled)";
  }
  return !descr.empty() && descr.front() == '>' ? " (big-endian)" : "";
}

std::string trimmed(std::string const& text) {
  auto const begin = std::find_if_not(text.begin(), text.end(), is_space);
  auto const end = std::find_if_not(text.rbegin(), std::make_reverse_iterator(begin), is_space).base();
  return {begin, end};
}

DataType parse_type(std::string const& member, std::string const& descr) {
  // A text begins with its quote; True, False and tuples do not.
  for (auto const& [code, dtype] : kTypes) {
    if (descr == std::string("'") + code) {
      return dtype;
    }
  }
  auto const found = descr.front() == '\'' ? descr.substr(1) : descr;
  throw bad_file(member + " has type " + shown(found) + hint(found) +
                 "; expected little-endian float32 ('<f4'), float16 ('<f2') or bfloat16 ('|V2'); convert the weights");
}

}  // namespace

uint64_t npy_header_bytes(std::string const& where, std::string const& member, std::vector<uint8_t> const& start) {
  auto const what = where + ": member " + shown(member);
  if (start.size() < kNpyStartBytes || !std::equal(kMagic.begin(), kMagic.end(), start.begin())) {
    auto const found =
        std::string(start.begin(), start.begin() + static_cast<int64_t>(std::min<size_t>(6, start.size())));
    throw bad_file(what + " begins with " + shown(found) +
                   "; expected '\\x93NUMPY', an .npy array; write the file with numpy.savez");
  }
  auto const major = start[6];
  if (major < 1 || major > 3 || start[7] != 0) {
    throw bad_file(what + " has .npy version " + std::to_string(major) + "." + std::to_string(start[7]) +
                   "; expected 1.0, 2.0 or 3.0; write the file with numpy.savez");
  }
  size_t const width = major == 1 ? 2 : 4;
  uint64_t length = 0;
  for (size_t i = width; i-- > 0;) {
    length = length << 8U | start[8 + i];
  }
  auto const bytes = 8 + width + length;
  if (bytes > kMaxHeader) {
    throw bad_file(what + " has an .npy header of " + std::to_string(bytes) + " bytes; at most " +
                   std::to_string(kMaxHeader) + " are allowed; save a plain array");
  }
  return bytes;
}

NpyHeader parse_npy_header(std::string const& where, std::string const& member, std::vector<uint8_t> const& header) {
  auto const what = where + ": member " + shown(member);
  std::string const text(header.begin() + (header[6] == 1 ? 10 : 12), header.end());
  auto const fields = DictReader(text).read();
  bool const complete =
      fields && fields->count("descr") == 1 && fields->count("fortran_order") == 1 && fields->count("shape") == 1;
  auto const sizes = complete ? parse_shape(fields->at("shape")) : std::nullopt;
  if (!sizes) {
    throw bad_file(what + " has the .npy header " + shown(trimmed(text)) +
                   "; expected descr, fortran_order and shape of a plain array; save a plain array");
  }
  NpyHeader parsed;
  parsed.dtype = parse_type(what, fields->at("descr"));
  auto const& order = fields->at("fortran_order");
  if (order != "False") {
    throw bad_file(what + " has fortran_order " + order +
                   " (column-major); expected False; save numpy.ascontiguousarray of it");
  }
  for (auto const& digits : *sizes) {
    auto const size = std::stoull(digits);  // 19 digits fit 64 bits
    if (size > kMaxTensorBytes) {
      throw bad_file(what + " has the shape " + fields->at("shape").substr(0, 80) + "; a dimension is over " +
                     std::to_string(kMaxTensorBytes) + "; write the file again");
    }
    parsed.shape.push_back(static_cast<int64_t>(size));
  }
  return parsed;
}

}  // namespace moe_infer
