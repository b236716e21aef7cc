#include "core/policy_settings.h"

#include <array>
#include <cstdint>
#include <cstdlib>

#include "core/error.h"

namespace moe_infer {
namespace {

constexpr char const* kVariable = "MOE_INFER_POLICY";
constexpr char const* kForms = "lru, lfu:HALF_LIFE or halved:HALF_LIFE";

struct Name {
  char const* name;
  PolicyKind kind;
  bool has_half_life;
};

constexpr std::array<Name, 3> kNames{
    {{"lru", PolicyKind::kLru, false}, {"lfu", PolicyKind::kLfu, true}, {"halved", PolicyKind::kHalvedCounts, true}}};

}  // namespace

PolicySettings parse_policy(std::string const& text, std::string const& source) {
  auto const colon = text.find(':');
  for (auto const& name : kNames) {
    if (text.substr(0, colon) != name.name) {
      continue;
    }
    PolicySettings settings;
    settings.kind = name.kind;
    if (colon == std::string::npos) {
      return settings;
    }
    if (!name.has_half_life) {
      throw invalid(source + ": '" + name.name + "' takes no number, got '" + text + "'");
    }
    auto const number = text.substr(colon + 1);
    bool const digits =
        !number.empty() && number.size() <= 9 && number.find_first_not_of("0123456789") == std::string::npos;
    settings.half_life = digits ? static_cast<uint32_t>(std::stoul(number)) : 0;
    if (settings.half_life < 1 || settings.half_life > kMostHalfLife) {
      throw invalid(source + ": HALF_LIFE must be a number of calls from 1 to " + std::to_string(kMostHalfLife) +
                    ", got '" + number + "' in '" + text + "'");
    }
    return settings;
  }
  throw invalid(source + " must be " + kForms + ", got '" + text + "'");
}

PolicySettings policy_from_environment() {
  char const* const text = std::getenv(kVariable);
  if (text == nullptr || *text == '\0') {
    return {};
  }
  return parse_policy(text, std::string("environment variable ") + kVariable);
}

std::string to_text(PolicySettings const& settings) {
  for (auto const& name : kNames) {
    if (name.kind == settings.kind) {
      return name.has_half_life ? std::string(name.name) + ":" + std::to_string(settings.half_life) : name.name;
    }
  }
  return "";
}

}  // namespace moe_infer
