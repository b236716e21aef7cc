#include "core/policy_settings.h"

#include <array>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "core/error.h"

namespace moe_infer {
namespace {

constexpr char const* kVariable = "MOE_INFER_POLICY";
constexpr char const* kForms = "lru, lfu:HALF_LIFE or steady:HALF_LIFE:STAY_CALLS:STAY_PERCENT";

struct Parameter {
  char const* name;
  uint32_t PolicySettings::* member;
  uint32_t least, most;
};

constexpr std::array<Parameter, 3> kParameters{{{"HALF_LIFE", &PolicySettings::half_life, 1, kMostHalfLife},
                                                {"STAY_CALLS", &PolicySettings::stay_calls, 1, kMostStayCalls},
                                                {"STAY_PERCENT", &PolicySettings::stay_percent, 0, kMostStayPercent}}};

// A policy looks at the first `parameters` of the list above.
struct Name {
  char const* name;
  PolicyKind kind;
  size_t parameters;
};

constexpr std::array<Name, 3> kNames{
    {{"lru", PolicyKind::kLru, 0}, {"lfu", PolicyKind::kLfu, 1}, {"steady", PolicyKind::kSteadyLfu, 3}}};

std::vector<std::string> split(std::string const& text) {
  std::vector<std::string> parts(1);
  for (char const letter : text) {
    if (letter == ':') {
      parts.emplace_back();
    } else {
      parts.back() += letter;
    }
  }
  return parts;
}

bool parse_number(std::string const& text, Parameter const& parameter, uint32_t* value) {
  if (text.empty() || text.size() > 9 || text.find_first_not_of("0123456789") != std::string::npos) {
    return false;
  }
  *value = static_cast<uint32_t>(std::stoul(text));
  return *value >= parameter.least && *value <= parameter.most;
}

}  // namespace

PolicySettings parse_policy(std::string const& text, std::string const& source) {
  auto const parts = split(text);
  for (auto const& name : kNames) {
    if (parts[0] != name.name) {
      continue;
    }
    if (parts.size() > name.parameters + 1) {
      throw invalid(source + " must be " + kForms + ": '" + name.name + "' takes " + std::to_string(name.parameters) +
                    " numbers, got '" + text + "'");
    }
    PolicySettings settings;
    settings.kind = name.kind;
    for (size_t i = 1; i < parts.size(); ++i) {
      auto const& parameter = kParameters[i - 1];
      if (!parse_number(parts[i], parameter, &(settings.*parameter.member))) {
        throw invalid(source + ": " + parameter.name + " must be a number from " + std::to_string(parameter.least) +
                      " to " + std::to_string(parameter.most) + ", got '" + parts[i] + "' in '" + text + "'");
      }
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
      std::string text = name.name;
      for (size_t i = 0; i < name.parameters; ++i) {
        text += ":" + std::to_string(settings.*kParameters[i].member);
      }
      return text;
    }
  }
  return "";
}

}  // namespace moe_infer
