#include "core/file_index.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <tuple>

#include "core/error.h"

namespace moe_infer {
namespace {

constexpr size_t kMostShown = 80;
constexpr size_t kMostListed = 4;
constexpr size_t kMaxRank = 8;

std::string escaped(char character, char quote, bool utf8) {
  auto const byte = static_cast<unsigned char>(character);
  if (character == quote || character == '\\') {
    return std::string("\\") + character;
  }
  if (byte >= 0x20 && byte != 0x7F && (utf8 || byte < 0x80)) {
    return {character};
  }
  std::array<char, 5> text{};
  std::snprintf(text.data(), text.size(), "\\x%02x", byte);
  return text.data();
}

}  // namespace

bool is_utf8(std::string const& text) {
  for (size_t i = 0; i < text.size();) {
    auto const lead = static_cast<unsigned char>(text[i]);
    size_t const extra = lead < 0x80                   ? 0
                         : lead >= 0xC2 && lead < 0xE0 ? 1
                         : (lead & 0xF0U) == 0xE0      ? 2
                         : lead >= 0xF0 && lead < 0xF5 ? 3
                                                       : text.size();
    if (extra >= text.size() - i) {
      return false;
    }
    uint32_t point = extra == 0 ? lead : lead & (0x3FU >> extra);
    for (size_t j = 1; j <= extra; ++j) {
      auto const next = static_cast<unsigned char>(text[i + j]);
      if ((next & 0xC0U) != 0x80U) {
        return false;
      }
      point = point << 6U | (next & 0x3FU);
    }
    // Longer than needed, a surrogate, or beyond Unicode.
    if ((extra == 2 && (point < 0x800 || (point >= 0xD800 && point < 0xE000))) ||
        (extra == 3 && (point < 0x10000 || point > 0x10FFFF))) {
      return false;
    }
    i += extra + 1;
  }
  return true;
}

std::string shown(std::string const& name) {
  bool const apostrophe = name.find('\'') != std::string::npos && name.find('"') == std::string::npos;
  char const quote = apostrophe ? '"' : '\'';
  bool const utf8 = is_utf8(name);  // a message must be
  std::string text = {quote};
  size_t end = name.size();
  if (end > kMostShown) {
    end = kMostShown - 3;
    while (end > 0 && (static_cast<unsigned char>(name[end]) & 0xC0U) == 0x80U) {
      --end;  // not inside a character of UTF-8
    }
  }
  for (size_t i = 0; i < end; ++i) {
    text += escaped(name[i], quote, utf8);
  }
  return text + quote + (end < name.size() ? "..." : "");
}

std::string listed(std::vector<std::string> const& items) {
  std::string text;
  for (size_t i = 0; i < std::min(items.size(), kMostListed); ++i) {
    text += (i == 0 ? "" : ", ") + items[i];
  }
  return items.size() <= kMostListed ? text : text + " and " + std::to_string(items.size() - kMostListed) + " more";
}

std::string shape_text(std::vector<int64_t> const& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + (shape.size() == 1 ? ",)" : ")");
}

uint64_t tensor_bytes(std::string const& where, std::string const& name, DataType dtype,
                      std::vector<int64_t> const& shape) {
  if (shape.size() > kMaxRank) {
    throw bad_file(where + ": tensor " + shown(name) + " has " + std::to_string(shape.size()) +
                   " dimensions; at most 8 are expected; write the file again");
  }
  uint64_t bytes = size_of(dtype);
  uint64_t largest = bytes;  // a zero elsewhere must not hide dimensions whose product overflows
  for (auto const size : shape) {
    auto const factor = static_cast<uint64_t>(std::max<int64_t>(size, 1));
    if (largest > kMaxTensorBytes / factor) {
      std::string product;
      for (auto const dimension : shape) {
        product += (product.empty() ? "" : " x ") + std::to_string(dimension);
      }
      throw bad_file(where + ": tensor " + shown(name) + " of shape " + product + " and type " + name_of(dtype) +
                     " overflows; its size must be at most " + std::to_string(kMaxTensorBytes) +
                     " bytes; write the file again");
    }
    largest *= factor;
    bytes *= static_cast<uint64_t>(size);
  }
  return bytes;
}

void check_layout(std::string const& where, std::vector<Span> spans, uint64_t begin, uint64_t end, bool holes) {
  std::sort(spans.begin(), spans.end(), [](Span const& a, Span const& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  uint64_t position = begin;
  std::string previous = "the header";
  for (auto const& span : spans) {
    auto const tensor = "tensor " + shown(span.name);
    if (span.begin > span.end) {
      throw bad_file(where + ": " + tensor + " ends at byte " + std::to_string(span.end) + ", before its begin at " +
                     std::to_string(span.begin) + "; the index is damaged, write the file again");
    }
    if (span.end > end) {
      throw bad_file(where + ": " + tensor + " ends at byte " + std::to_string(span.end) + ", but the data end at " +
                     std::to_string(end) + "; the file is truncated or its index is damaged, copy or write it again");
    }
    if (span.begin < position) {
      throw bad_file(where + ": " + tensor + " begins at byte " + std::to_string(span.begin) + ", inside " + previous +
                     ", which ends at " + std::to_string(position) +
                     "; tensors must not overlap, write the file again");
    }
    if (span.begin > position && !holes) {
      throw bad_file(where + ": " + std::to_string(span.begin - position) + " bytes before " + tensor + ", from byte " +
                     std::to_string(position) +
                     " on, belong to no tensor; holes are not allowed, write the file again");
    }
    position = span.end;
    previous = tensor;
  }
  if (position < end && !holes) {
    throw bad_file(where + ": the last " + std::to_string(end - position) + " bytes, from byte " +
                   std::to_string(position) +
                   " on, belong to no tensor; expected the data to end there, write the file again");
  }
}

}  // namespace moe_infer
