// Calls the plugin as TensorRT does, through the real registry, where Python's bindings do not reach. Needs no GPU.
// Usage: tensorrt_probe LIBNVINFER LIBMOE_INFER WEIGHTS(T5_FF, 4 experts, d_model 8, hidden 12). Exit status 0: all
// right.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

using namespace nvinfer1;

#define EXPECT(condition)                                                   \
  do {                                                                      \
    if (!(condition)) {                                                     \
      std::fprintf(stderr, "line %d: %s is false\n", __LINE__, #condition); \
      std::exit(1);                                                         \
    }                                                                       \
  } while (false)

namespace {

constexpr int32_t kExperts = 4, kDModel = 8, kHidden = 12;

char const* (*last_error)() = nullptr;  // moe_infer_last_error

struct DimensionValue : apiv::VDimensionExpr {
  int64_t value = -1;
  bool isConstant() const override { return value >= 0; }
  int64_t getConstantValue() const override { return value; }
  bool isSizeTensor() const override { return false; }
};

struct Dimension : IDimensionExpr {
  explicit Dimension(int64_t value) {
    value_.value = value;
    mImpl = &value_;
  }
  DimensionValue value_;
};

struct Builder : IExprBuilder {};

DynamicPluginTensorDesc tensor(DataType type, std::vector<int64_t> const& dims, int64_t most_tokens = 16) {
  DynamicPluginTensorDesc description{};
  description.desc.type = type;
  description.desc.format = TensorFormat::kLINEAR;
  description.desc.dims.nbDims = static_cast<int32_t>(dims.size());
  for (size_t i = 0; i < dims.size(); ++i) {
    description.desc.dims.d[i] = dims[i];
  }
  description.min = description.opt = description.max = description.desc.dims;
  description.min.d[0] = 1;
  description.opt.d[0] = description.max.d[0] = most_tokens;
  return description;
}

template <class T>
T* capability(IPluginV3* plugin, PluginCapabilityType type) {
  auto* const found = static_cast<T*>(plugin->getCapabilityInterface(type));
  EXPECT(found != nullptr);
  return found;
}

void check_types_and_formats(IPluginV3OneBuild* build) {
  EXPECT(build->getNbOutputs() == 1);
  for (DataType const type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
    DataType output = DataType::kINT32;
    EXPECT(build->getOutputDataTypes(&output, 1, &type, 1) == 0 && output == type);
    DynamicPluginTensorDesc descriptions[3] = {tensor(type, {-1, kDModel}), tensor(DataType::kFLOAT, {-1, kExperts}),
                                               tensor(type, {-1, kDModel})};
    for (int32_t position = 0; position < 3; ++position) {
      EXPECT(build->supportsFormatCombination(position, descriptions, 2, 1));
    }
    descriptions[2].desc.type = type == DataType::kFLOAT ? DataType::kHALF : DataType::kFLOAT;
    EXPECT(!build->supportsFormatCombination(2, descriptions, 2, 1));  // the output is of input 0's type
    descriptions[1].desc.type = type == DataType::kHALF ? DataType::kBF16 : DataType::kHALF;
    EXPECT(!build->supportsFormatCombination(1, descriptions, 2, 1));
    descriptions[0].desc.format = TensorFormat::kCHW32;
    EXPECT(!build->supportsFormatCombination(0, descriptions, 2, 1));
  }
  auto const integers = tensor(DataType::kINT32, {-1, kDModel});
  EXPECT(!build->supportsFormatCombination(0, &integers, 1, 1));
  DataType const types[4] = {DataType::kHALF, DataType::kFLOAT, DataType::kFLOAT, DataType::kFLOAT};
  DataType output;
  EXPECT(build->getOutputDataTypes(&output, 1, types, 3) == 0 && output == DataType::kHALF);
  EXPECT(build->getOutputDataTypes(&output, 1, types, 4) != 0);
  // next_router_logits may have any width, and a type of its own.
  DynamicPluginTensorDesc with_next[4] = {
      tensor(DataType::kHALF, {-1, kDModel}), tensor(DataType::kHALF, {-1, kExperts}),
      tensor(DataType::kFLOAT, {-1, kExperts + 1}), tensor(DataType::kHALF, {-1, kDModel})};
  for (int32_t position = 0; position < 4; ++position) {
    EXPECT(build->supportsFormatCombination(position, with_next, 3, 1));
  }
  with_next[2].desc.type = DataType::kBF16;
  EXPECT(!build->supportsFormatCombination(2, with_next, 3, 1));
}

void check_shapes(IPluginV3OneBuild* build) {
  Builder builder;
  Dimension batch(-1), tokens(-1), d_model(kDModel), wrong(kDModel + 1);
  DimsExprs output{};
  DimsExprs const three{3, {&batch, &tokens, &d_model}};
  EXPECT(build->getOutputShapes(&three, 1, nullptr, 0, &output, 1, builder) == 0);
  EXPECT(output.nbDims == 3 && output.d[0] == &batch && output.d[1] == &tokens && output.d[2] == &d_model);
  DimsExprs const one{1, {&d_model}};
  EXPECT(build->getOutputShapes(&one, 1, nullptr, 0, &output, 1, builder) != 0);
  DimsExprs const other{2, {&tokens, &wrong}};
  EXPECT(build->getOutputShapes(&other, 1, nullptr, 0, &output, 1, builder) != 0);
}

void check_configure(IPluginV3OneBuild* build) {
  auto const output = tensor(DataType::kHALF, {-1, kDModel});
  auto const unknown = tensor(DataType::kINT8, {-1, kDModel});
  EXPECT(build->configurePlugin(&unknown, 1, &output, 1) != 0);
  auto const wide = tensor(DataType::kHALF, {-1, kDModel + 1});
  EXPECT(build->configurePlugin(&wide, 1, &output, 1) != 0);
  auto const input = tensor(DataType::kHALF, {-1, kDModel});
  EXPECT(build->configurePlugin(&input, 1, &output, 1) == 0);
}

PluginField const* field_of(PluginFieldCollection const* fields, char const* name) {
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    if (std::strcmp(fields->fields[i].name, name) == 0) {
      return &fields->fields[i];
    }
  }
  return nullptr;
}

// What an engine holds makes a plugin again, which holds the same.
void check_round_trip(IPluginCreatorV3One* creator, IPluginV3* plugin) {
  auto const* const fields =
      capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
  EXPECT(fields != nullptr);
  auto const* const digest = field_of(fields, "expert_weight_digest");
  EXPECT(digest != nullptr && digest->length > 10 && digest->type == PluginFieldType::kCHAR);
  auto const* const scaling = field_of(fields, "routed_scaling_factor");
  EXPECT(scaling != nullptr && scaling->type == PluginFieldType::kFLOAT32 && scaling->length == 1);
  EXPECT(*static_cast<float const*>(scaling->data) == 2.5F);
  auto* const again = creator->createPlugin("again", fields, TensorRTPhase::kRUNTIME);
  EXPECT(again != nullptr);
  auto* const runtime = capability<IPluginV3OneRuntime>(again, PluginCapabilityType::kRUNTIME);
  auto const* const fields_again = runtime->getFieldsToSerialize();
  EXPECT(fields_again != nullptr && fields_again->nbFields == fields->nbFields);
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    auto const& field = fields->fields[i];
    auto const* const twin = field_of(fields_again, field.name);
    EXPECT(twin != nullptr && twin->type == field.type && twin->length == field.length);
    size_t const size = field.type == PluginFieldType::kCHAR ? 1 : 4;
    EXPECT(std::memcmp(twin->data, field.data, size * static_cast<size_t>(field.length)) == 0);
  }
  // Run without a context: an error, and the process lives.
  auto const input = tensor(DataType::kHALF, {3, kDModel}, 3).desc;
  void const* inputs[1] = {nullptr};
  void* outputs[1] = {nullptr};
  EXPECT(runtime->enqueue(&input, &input, inputs, outputs, nullptr, nullptr) != 0);

  std::vector<PluginField> changed(fields->fields, fields->fields + fields->nbFields);
  for (auto& field : changed) {
    if (std::strcmp(field.name, "expert_weight_digest") == 0) {
      field.data = "00000000-1";
      field.length = 11;
    }
  }
  PluginFieldCollection const other{static_cast<int32_t>(changed.size()), changed.data()};
  // A changed file: the engine loads, since ONNX Runtime would end the process otherwise, and every run fails.
  auto* const stale = creator->createPlugin("other", &other, TensorRTPhase::kRUNTIME);
  EXPECT(stale != nullptr);
  auto* const stale_runtime = capability<IPluginV3OneRuntime>(stale, PluginCapabilityType::kRUNTIME);
  EXPECT(stale_runtime->enqueue(&input, &input, inputs, outputs, nullptr, nullptr) != 0);
  delete stale;

  auto const* const workspace = field_of(fields, "network_workspace");
  EXPECT(workspace != nullptr && workspace->type == PluginFieldType::kINT32 && workspace->length == 2);
  auto const* const asked = static_cast<int32_t const*>(workspace->data);
  EXPECT(asked[0] == 16 && asked[1] > 0);
  // One that another version of the library asked for, whose kernels need less: no run, and the reason.
  int32_t const smaller[2] = {asked[0], asked[1] - 1};
  for (auto& field : changed) {
    if (std::strcmp(field.name, "network_workspace") == 0) field.data = smaller;
    if (std::strcmp(field.name, "expert_weight_digest") == 0) field = *digest;
  }
  auto* const older = creator->createPlugin("older", &other, TensorRTPhase::kRUNTIME);
  EXPECT(older != nullptr);
  auto* const attached =
      capability<IPluginV3OneRuntime>(older, PluginCapabilityType::kRUNTIME)->attachToContext(nullptr);
  EXPECT(attached != nullptr);
  auto* const attached_runtime = capability<IPluginV3OneRuntime>(attached, PluginCapabilityType::kRUNTIME);
  EXPECT(attached_runtime->onShapeChange(&input, 1, &input, 1) != 0);
  EXPECT(std::strstr(last_error(), "built by another version of moe_infer") != nullptr);
  EXPECT(attached_runtime->enqueue(&input, &input, inputs, outputs, nullptr, nullptr) != 0);
  EXPECT(std::strstr(last_error(), "delete the engine") != nullptr);
  delete attached;
  delete older;
  delete again;
}

}  // namespace

int main(int argc, char** argv) {
  EXPECT(argc == 4);
  void* const tensorrt = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  EXPECT(tensorrt != nullptr);
  void* const library = dlopen(argv[2], RTLD_NOW | RTLD_LOCAL);
  EXPECT(library != nullptr);
  last_error = reinterpret_cast<char const* (*)()>(dlsym(library, "moe_infer_last_error"));
  EXPECT(last_error != nullptr);
  auto* const get = reinterpret_cast<IPluginRegistry* (*)()>(dlsym(tensorrt, "getPluginRegistry"));
  EXPECT(get != nullptr);
  for (char const* name : {"MoELayer", "MoELayerPlugin"}) {
    // Registered by loading alone, as ONNX Runtime's trt_extra_plugin_lib_paths needs it.
    auto* const creator = static_cast<IPluginCreatorV3One*>(get()->getCreator(name, "1", ""));
    EXPECT(creator != nullptr);
    EXPECT(std::strcmp(creator->getPluginName(), name) == 0 && std::strcmp(creator->getPluginVersion(), "1") == 0);
    EXPECT(creator->createPlugin("none", nullptr, TensorRTPhase::kBUILD) == nullptr);

    int64_t const experts = kExperts;  // 64 bits are taken too
    int32_t const hidden = kHidden;
    std::vector<double> const centroids(kExperts * kDModel, 0.25);
    double const scaling = 2.5;
    std::string const path = argv[3];
    PluginField const given[] = {
        {"expert_count", &experts, PluginFieldType::kINT64, 1},
        {"hidden_size", &hidden, PluginFieldType::kINT32, 1},
        {"expert_sublayer_type", "T5_FF", PluginFieldType::kUNKNOWN, 5},  // without NUL
        {"expert_weight_file", path.c_str(), PluginFieldType::kCHAR, static_cast<int32_t>(path.size() + 1)},
        {"expert_centroids", centroids.data(), PluginFieldType::kFLOAT64, kExperts * kDModel},
        {"moe_variant", "softmax_topk", PluginFieldType::kCHAR, 13},
        {"routed_scaling_factor", &scaling, PluginFieldType::kFLOAT64, 1},
    };
    PluginFieldCollection const fields{7, given};
    auto* const plugin = creator->createPlugin("moe", &fields, TensorRTPhase::kBUILD);
    EXPECT(plugin != nullptr);
    auto* const core = capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE);
    EXPECT(std::strcmp(core->getPluginName(), name) == 0 && std::strcmp(core->getPluginNamespace(), "") == 0);
    auto* const build = capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
    check_types_and_formats(build);
    check_shapes(build);
    check_configure(build);
    check_round_trip(creator, plugin);
    auto* const copy = plugin->clone();
    EXPECT(copy != nullptr && copy != plugin);
    delete plugin;
    check_round_trip(creator, copy);
    delete copy;
  }
  std::puts("all right");
  return 0;
}
