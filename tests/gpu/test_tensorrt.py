"""The plugin inside engines: through ONNX Runtime's TensorRT provider and TensorRT's Python API."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")

from gpu_layers import make_attributes, make_input, reference, same_bits  # noqa: E402
from gpu_threads import in_threads  # noqa: E402
from tensorrt_needed import ENGINE, TRT  # noqa: E402

import moe_infer  # noqa: E402
from layer_models import ELEMENTS, NUMPY, assert_close  # noqa: E402
from moe_infer.op import DOMAIN  # noqa: E402
from moe_infer.runtime import plugin  # noqa: E402

D_MODEL = 64


pytestmark = ENGINE


def matmul_moe_add(
    layers: list[dict[str, Any]], dtype: str = "float32", logits: bool = False
) -> onnx.ModelProto:
    """x @ w, one MoELayer after the other, + b; the router's logits are a MatMul of the graph."""
    rng = np.random.default_rng(5)
    element = ELEMENTS[dtype]
    kind = NUMPY[dtype]
    dims: list[Any] = ["batch", "seq", D_MODEL]
    w = (rng.standard_normal((D_MODEL, D_MODEL)) / 8).astype(kind)
    initializers = [
        numpy_helper.from_array(w, "w"),
        numpy_helper.from_array(rng.standard_normal(D_MODEL).astype(kind), "b"),
    ]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h0"], "enter")]
    infos = []
    for i, attributes in enumerate(layers):
        inputs = [f"h{i}"]
        if logits:
            gate = rng.standard_normal((D_MODEL, attributes["expert_count"])) / 8
            initializers.append(numpy_helper.from_array(gate.astype(kind), f"gate{i}"))
            nodes.append(helper.make_node("MatMul", [f"h{i}", f"gate{i}"], [f"s{i}"], f"gate_{i}"))
            inputs.append(f"s{i}")
        name = f"h{i + 1}"
        nodes.append(
            helper.make_node("MoELayer", inputs, [name], f"moe_{i}", domain=DOMAIN, **attributes)
        )
        infos.append(helper.make_tensor_value_info(name, element, dims))
    nodes.append(helper.make_node("Add", [f"h{len(layers)}", "b"], ["y"], "leave"))
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info("x", element, dims)],
        [helper.make_tensor_value_info("y", element, dims)],
        initializers,
        value_info=infos,
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 9
    return model


def expect(model: onnx.ModelProto, layers: list[dict[str, Any]], x: np.ndarray) -> np.ndarray:
    """The graph in float64, rounded to its type where the graph rounds."""
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    h = (x.astype(np.float64) @ constants["w"].astype(np.float64)).astype(x.dtype)
    for i, attributes in enumerate(layers):
        logits = None
        if f"gate{i}" in constants:
            logits = h.astype(np.float64) @ constants[f"gate{i}"].astype(np.float64)
            logits = logits.astype(x.dtype)
        h = reference(attributes, h.reshape(-1, D_MODEL), _flat(logits)).reshape(h.shape)
        h = h.astype(x.dtype)
    return h.astype(np.float64) + constants["b"].astype(np.float64)


def _flat(logits: np.ndarray | None) -> np.ndarray | None:
    return None if logits is None else logits.reshape(-1, logits.shape[-1])


def session(
    model: onnx.ModelProto | Path, profile: Path | None = None, **options: Any
) -> ort.InferenceSession:
    """Stock ONNX Runtime, as a user makes it."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    if profile is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(profile / "profile")
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(
        source, settings, [TRT], [{"device_id": 0, **options}], enable_fallback=0
    )


def tokens(batch: int, seq: int, dtype: str = "float32", seed: int = 1) -> np.ndarray:
    return make_input(batch * seq, D_MODEL, dtype, seed).reshape(batch, seq, D_MODEL)


def nodes_run(made: ort.InferenceSession) -> set[tuple[str, str]]:
    """(provider, node) of everything that ran."""
    events = json.loads(Path(made.end_profiling()).read_text())
    return {
        (event["args"]["provider"], event["name"])
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    }


def count_engines(folder: Path) -> int:
    return len(list(folder.glob("*.engine")))


@pytest.mark.parametrize("slots", [2, 8])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("sublayer", ["T5_FF", "Gated_SiLU", "Identity"])
def test_one_engine(tmp_path: Path, sublayer: str, dtype: str, slots: int) -> None:
    logits = sublayer != "T5_FF"
    attributes = make_attributes(
        tmp_path,
        sublayer,
        "softmax_topk",
        8,
        D_MODEL,
        96,
        2,
        dtype,
        centroids=not logits,
        max_concurrency=slots,
    )
    model = matmul_moe_add([attributes], dtype, logits)
    x = tokens(2, 9, dtype)
    made = session(model, profile=tmp_path)
    (y,) = made.run(None, {"x": x})
    # The engine's own MatMul may round otherwise than numpy's.
    assert_close(y, expect(model, [attributes], x), "float16" if dtype == "float16" else "float32")
    ran = nodes_run(made)
    assert len(ran) == 1, ran
    assert {provider for provider, _ in ran} == {TRT}


def test_two_layers_and_dynamic_shapes(tmp_path: Path) -> None:
    layers = [
        make_attributes(tmp_path, "T5_FF", "default", 8, D_MODEL, 96, max_concurrency=3),
        make_attributes(tmp_path, "Gated_SiLU", "topk_softmax", 6, D_MODEL, 40, 2),
    ]
    model = matmul_moe_add(layers)
    made = session(
        model,
        profile=tmp_path,
        trt_profile_min_shapes="x:1x1x64",
        trt_profile_opt_shapes="x:2x16x64",
        trt_profile_max_shapes="x:4x64x64",
        trt_engine_cache_enable=True,
        trt_engine_cache_path=str(tmp_path / "cache"),
    )
    for batch, seq in ((1, 1), (2, 16), (4, 64), (3, 5), (1, 1)):
        x = tokens(batch, seq)
        (y,) = made.run(None, {"x": x})
        assert_close(y, expect(model, layers, x), "float32")
    ran = nodes_run(made)
    assert len({name for _, name in ran}) == 1, ran
    assert count_engines(tmp_path / "cache") == 1


@pytest.mark.parametrize("slots", [2, 8])
def test_attributes_of_every_kind_reach_the_layer(tmp_path: Path, slots: int) -> None:
    """DeepSeek-V3's router, then gpt-oss's experts: scalar floats, lists of them, biases."""
    layers = [
        make_attributes(
            tmp_path,
            "Gated_SiLU",
            "sigmoid_topk",
            8,
            D_MODEL,
            96,
            3,
            centroids=False,
            normalize_routing_weights=1,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.75,
            max_concurrency=slots,
        ),
        make_attributes(
            tmp_path,
            "Clamped_SwiGLU",
            "topk_softmax",
            8,
            D_MODEL,
            40,
            4,
            centroids=False,
            expert_bias=1,
            activation_alpha=1.25,
            swiglu_limit=1.5,
            max_concurrency=slots,
        ),
    ]
    model = matmul_moe_add(layers, logits=True)
    x = tokens(2, 9)
    made = session(model, profile=tmp_path)
    (y,) = made.run(None, {"x": x})
    assert_close(y, expect(model, layers, x), "float32")
    assert {provider for provider, _ in nodes_run(made)} == {TRT}


def cached(model: Path, cache: Path) -> ort.InferenceSession:
    return session(model, trt_engine_cache_enable=True, trt_engine_cache_path=str(cache))


def test_engine_cache(tmp_path: Path) -> None:
    attributes = make_attributes(tmp_path, "T5_FF", "default", 8, D_MODEL, 96, max_concurrency=3)
    model = matmul_moe_add([attributes])
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    x = tokens(2, 9)
    (first,) = cached(path, tmp_path / "cache").run(None, {"x": x})
    engines = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("*.engine")}
    assert len(engines) == 1
    (second,) = cached(path, tmp_path / "cache").run(None, {"x": x})
    assert {p: p.stat().st_mtime_ns for p in engines} == engines  # loaded, not built again
    assert same_bits(first, second)
    assert_close(first, expect(model, [attributes], x), "float32")


def test_a_changed_file_under_a_cached_engine_is_an_error(tmp_path: Path) -> None:
    attributes = make_attributes(tmp_path, "T5_FF", "default", 8, D_MODEL, 96)
    path = tmp_path / "model.onnx"
    onnx.save(matmul_moe_add([attributes]), path)
    x = tokens(2, 9)
    cached(path, tmp_path / "cache").run(None, {"x": x})
    assert count_engines(tmp_path / "cache") == 1
    # Another file in its place: other names in the index, hence another digest.
    other = make_attributes(
        tmp_path, "T5_FF", "default", 8, D_MODEL, 96, form="safetensors separate"
    )
    shutil.copy(other["expert_weight_file"], attributes["expert_weight_file"])
    with pytest.raises(Exception, match=r".") as raised:  # ORT's own types differ by version
        cached(path, tmp_path / "cache").run(None, {"x": x})
    said = plugin.load().moe_infer_last_error().decode()
    assert "has digest" in said and attributes["expert_weight_file"] in said, raised.value


def test_models_that_differ_in_attributes_alone_share_no_engine(tmp_path: Path) -> None:
    """The rewriter's rule, by hand: the digest is part of the output's name, hence of the key."""
    x = tokens(2, 9)
    outputs = []
    for router in ("default", "base_layer"):
        attributes = make_attributes(tmp_path, "T5_FF", router, 8, D_MODEL, 96)
        model = matmul_moe_add([attributes])
        for node in model.graph.node:
            for names in (node.input, node.output):
                for i, name in enumerate(names):
                    names[i] = f"h1_{router}" if name == "h1" else name
        model.graph.value_info[0].name = f"h1_{router}"
        path = tmp_path / router / "model.onnx"
        path.parent.mkdir()
        onnx.save(model, path)
        (y,) = cached(path, tmp_path / "cache").run(None, {"x": x})
        assert_close(y, expect(model, [attributes], x), "float32")
        outputs.append(y)
    assert not same_bits(*outputs)
    assert count_engines(tmp_path / "cache") == 2


@pytest.mark.parametrize(
    ("slots", "batch", "seq"), [(8, 2, 9), (4, 1, 2), (2, 1, 1)], ids=["resident", "some", "least"]
)
def test_cuda_graph(tmp_path: Path, slots: int, batch: int, seq: int) -> None:
    """Also of a layer that streams, when its slots hold whatever the tokens may choose."""
    attributes = make_attributes(tmp_path, "Gated_SiLU", "softmax_topk", 8, D_MODEL, 96, 2)
    attributes["max_concurrency"] = slots
    model = matmul_moe_add([attributes])
    shape = f"x:{batch}x{seq}x{D_MODEL}"
    made = session(
        model,
        trt_cuda_graph_enable=True,
        trt_profile_min_shapes=shape,
        trt_profile_opt_shapes=shape,
        trt_profile_max_shapes=shape,
    )
    x = ort.OrtValue.ortvalue_from_numpy(tokens(batch, seq), "cuda", 0)
    size = [batch, seq, D_MODEL]
    y = ort.OrtValue.ortvalue_from_shape_and_type(size, np.float32, "cuda", 0)
    binding = made.io_binding()
    binding.bind_ortvalue_input("x", x)
    binding.bind_ortvalue_output("y", y)
    for seed in range(12):  # the first runs capture, the others replay on new data
        values = tokens(batch, seq, seed=seed)
        x.update_inplace(values)
        made.run_with_iobinding(binding)
        assert_close(y.numpy(), expect(model, [attributes], values), "float32")


def test_two_sessions_in_two_threads(tmp_path: Path) -> None:
    models, all_layers = [], []
    for sublayer, slots in (("T5_FF", 2), ("Gated_SiLU", 8)):
        attributes = make_attributes(
            tmp_path, sublayer, "softmax_topk", 8, D_MODEL, 96, 2, max_concurrency=slots
        )
        all_layers.append([attributes])
        models.append(matmul_moe_add([attributes]))
    inputs = [tokens(2, 9, seed=seed) for seed in range(3)]

    def work(i: int) -> None:
        right = [expect(models[i], all_layers[i], x) for x in inputs]
        made = session(models[i])
        for turn in range(30):
            (y,) = made.run(None, {"x": inputs[turn % 3]})
            assert_close(y, right[turn % 3], "float32")

    in_threads(2, work)


@pytest.mark.alone
def test_two_sessions_on_one_model_share_resident_experts(tmp_path: Path) -> None:
    attributes = make_attributes(tmp_path, "Gated_SiLU", "default", 8, D_MODEL, 16384)
    model = matmul_moe_add([attributes])  # 12 MiB an expert, 96 MiB together
    x = tokens(2, 9)
    first = session(model)
    (expected,) = first.run(None, {"x": x})
    free = torch.cuda.mem_get_info()[0]
    second = session(model)
    (y,) = second.run(None, {"x": x})
    assert same_bits(y, expected)
    assert free - torch.cuda.mem_get_info()[0] < 90 << 20


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"max_concurrency": 0}, "'max_concurrency' must be at least 1, got 0"),
        ({"expert_sublayer_type": "GLU"}, "'expert_sublayer_type' is 'GLU'"),
        ({"hidden_size": 97}, "shape"),
        ({"expert_weight_file": "gone.safetensors"}, "gone.safetensors"),
    ],
    ids=str,
)
def test_errors_come_at_creation(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    attributes = make_attributes(tmp_path, "T5_FF", "default", 8, D_MODEL, 96)
    path = tmp_path / "model.onnx"
    onnx.save(matmul_moe_add([{**attributes, **change}]), path)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        moe_infer.InferenceSession(path, providers=[TRT])
    with pytest.raises(Exception, match=r"."):  # stock ONNX Runtime: in TensorRT's log
        session(path)
    assert sentence in plugin.load().moe_infer_last_error().decode()
    onnx.save(matmul_moe_add([attributes]), path)
    moe_infer.InferenceSession(path, providers=[TRT])  # and the process lives


def test_create_plugin_in_a_network_of_tensorrt(tmp_path: Path, trt: Any) -> None:
    attributes = make_attributes(tmp_path, "T5_FF", "default", 8, D_MODEL, 96, max_concurrency=3)
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    x = network.add_input("x", trt.float32, (-1, D_MODEL))
    layer = network.add_plugin_v3([x], [], moe_infer.create_plugin(**attributes))
    layer.get_output(0).name = "y"
    network.mark_output(layer.get_output(0))
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, D_MODEL), (16, D_MODEL), (64, D_MODEL))
    config.add_optimization_profile(profile)
    serialized = builder.build_serialized_network(network, config)
    assert serialized is not None
    engine = trt.Runtime(logger).deserialize_cuda_engine(serialized)
    context = engine.create_execution_context()
    stream = torch.cuda.Stream()
    for count in (1, 16, 64):
        values = make_input(count, D_MODEL, "float32")
        given = torch.from_numpy(values).cuda()
        found = torch.empty_like(given)
        torch.cuda.synchronize()
        context.set_input_shape("x", (count, D_MODEL))
        context.set_tensor_address("x", given.data_ptr())
        context.set_tensor_address("y", found.data_ptr())
        assert context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        assert_close(found.cpu().numpy(), reference(attributes, values), "float32")


def test_types_are_those_of_onnx() -> None:
    assert ELEMENTS["float16"] == TensorProto.FLOAT16  # the models above rely on it
