"""The budget of a session: the graph that ONNX Runtime is given, and what is said without a GPU."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import moe_infer
from moe_infer import inspect
from moe_infer.cuda_graph import captured_runs
from moe_infer.graph.lower_nodes import read_layers
from moe_infer.graph.replace import digest_name
from moe_infer.runtime import providers, session_budget
from moe_infer.runtime.once import Once
from test_budget import CPU, D_MODEL, SLOT, save_model, slots_of
from test_session import Recorder

VARIABLE = "MOE_INFER_GPU_BUDGET"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_said", Once())
    monkeypatch.setattr(session_budget, "_said", Once())
    monkeypatch.delenv(VARIABLE, raising=False)


def given_graph(recorder: Recorder, folder: Path) -> list[Any]:
    """Layers of the graph that ONNX Runtime was given last."""
    return read_layers(onnx.ModelProto.FromString(recorder.calls[-1][0]), folder)


def test_the_graph_for_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_model(tmp_path)
    before = path.read_bytes()
    recorder = Recorder(monkeypatch)
    made = moe_infer.InferenceSession(path, gpu_budget=9 * SLOT)
    layers = given_graph(recorder, tmp_path)
    assert [x.config.max_concurrency for x in layers] == [6, 3]
    assert made.gpu_budget is not None and slots_of(made.gpu_budget) == [6, 3]
    assert [info.slots for info in made.moe_layers] == [6, 3]
    assert sum(info.slots_bytes for info in made.moe_layers) == made.gpu_budget.nbytes == 9 * SLOT
    assert [info.name for info in made.moe_layers] == ["moe_0", "moe_1"]
    # Names say what the attributes are, so that no cached engine serves another budget.
    names = [x.node.output[0] for x in layers]
    assert all(name.startswith(f"h{i + 1}.moe_") for i, name in enumerate(names))
    assert layers[1].node.input[0] == names[0]
    moe_infer.InferenceSession(path, gpu_budget=10 * SLOT)
    others = [x.node.output[0] for x in given_graph(recorder, tmp_path)]
    assert others != names and others[0] != names[0]
    assert path.read_bytes() == before


@pytest.mark.parametrize("budget", [None, 9 * SLOT, 12 * SLOT])
def test_each_layer_is_described_once_and_as_it_runs(
    budget: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A description reads the file's headers; that of a session is the one after the split."""
    path = save_model(tmp_path)
    described: list[str] = []

    def counted(layer: Any) -> str:
        described.append(layer.name)
        return captured_runs(layer)

    Recorder(monkeypatch)
    monkeypatch.setattr(inspect, "captured_runs", counted)  # a part of every description
    made = moe_infer.InferenceSession(path, gpu_budget=budget)
    assert described == ["moe_0", "moe_1"]
    if budget is None:
        assert made.moe_layers == moe_infer.inspect_model(path)
    else:
        moe_infer.set_gpu_budget(path, budget, tmp_path / "out.onnx")
        assert made.moe_layers == moe_infer.inspect_model(tmp_path / "out.onnx")


def test_the_digest_is_that_of_the_attributes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the plugin finds the weights, nothing but the slots is changed."""
    path = save_model(tmp_path)
    monkeypatch.setenv("MOE_INFER_WEIGHT_DIR", str(tmp_path))
    recorder = Recorder(monkeypatch)
    moe_infer.InferenceSession(path, gpu_budget=9 * SLOT)
    found = given_graph(recorder, tmp_path)
    moe_infer.set_gpu_budget(path, 9 * SLOT, tmp_path / "out.onnx")
    written = read_layers(onnx.load(tmp_path / "out.onnx"), tmp_path)
    assert [x.node.output[0] for x in found] == [x.node.output[0] for x in written]
    assert [x.config for x in found] == [x.config for x in written]
    for layer in found:
        assert layer.node.output[0] == digest_name(layer.node.output[0], layer.config)
    # Without a budget, or with one that the file has already, it goes there as it is.
    made = moe_infer.InferenceSession(path)
    assert made.gpu_budget is None
    assert recorder.calls[-1][0] == path
    made = moe_infer.InferenceSession(tmp_path / "out.onnx", gpu_budget=9 * SLOT)
    assert made.gpu_budget is not None and slots_of(made.gpu_budget) == [6, 3]
    assert recorder.calls[-1][0] == tmp_path / "out.onnx"


def test_the_environment_and_the_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_model(tmp_path)
    recorder = Recorder(monkeypatch)
    monkeypatch.setenv(VARIABLE, "36K")
    moe_infer.InferenceSession(path)
    assert [x.config.max_concurrency for x in given_graph(recorder, tmp_path)] == [4, 2]
    moe_infer.InferenceSession(path, gpu_budget=f"{12 * SLOT}")
    assert [x.config.max_concurrency for x in given_graph(recorder, tmp_path)] == [8, 4]
    monkeypatch.setenv(VARIABLE, "")
    assert moe_infer.InferenceSession(path).gpu_budget is None
    calls = len(recorder.calls)
    monkeypatch.setenv(VARIABLE, "1K")
    with pytest.raises(
        ValueError, match=rf"^environment variable {VARIABLE}: 1024 bytes .*at least"
    ):
        moe_infer.InferenceSession(path)
    monkeypatch.setenv(VARIABLE, "some")
    with pytest.raises(ValueError, match=rf"^environment variable {VARIABLE} must be a number of"):
        moe_infer.InferenceSession(path)
    with pytest.raises(ValueError, match=rf"^gpu_budget: 7 bytes .* give at least {4 * SLOT} "):
        moe_infer.InferenceSession(path, gpu_budget=7)
    assert len(recorder.calls) == calls


def test_external_data_and_expert_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_model(tmp_path)
    model = onnx.load(path)
    bias = onnx.numpy_helper.from_array(np.ones(300, np.float32), "bias")
    model.graph.initializer.append(bias)
    onnx.save(model, path, save_as_external_data=True, location="own.data", size_threshold=0)
    recorder = Recorder(monkeypatch)
    moe_infer.InferenceSession(path, gpu_budget=9 * SLOT, expert_use=True)
    given, folder, *_ = recorder.calls[-1]
    parsed = onnx.ModelProto.FromString(given)
    entries = {e.key: e.value for e in parsed.graph.initializer[0].external_data}
    assert (entries["location"], Path(folder)) == ("own.data", tmp_path.resolve())
    layers = read_layers(parsed, tmp_path)
    assert [x.config.max_concurrency for x in layers] == [6, 3]
    made = {o for node in parsed.graph.node for o in node.output} | {"x"}
    taps = [n for n in parsed.graph.node if n.output[0].startswith("moe_infer/expert_use")]
    assert len(taps) == 2
    assert all(i in made for node in parsed.graph.node for i in node.input)


def test_without_a_gpu_it_is_said_once_and_has_no_effect(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_model(tmp_path)
    x = {"x": np.random.default_rng(1).standard_normal((1, 3, D_MODEL)).astype(np.float32)}
    plain = moe_infer.InferenceSession(path, providers=CPU)
    with caplog.at_level(logging.WARNING, "moe_infer"):
        for budget in (9 * SLOT, "1K", 9 * SLOT):
            made = moe_infer.InferenceSession(path, providers=CPU, gpu_budget=budget)
            assert made.lowered and made.gpu_budget is None
            assert made.moe_layers == plain.moe_layers
            assert np.array_equal(made.run(None, x)[0], plain.run(None, x)[0])
    assert [r.getMessage() for r in caplog.records] == [
        "gpu_budget has no effect: the layers are lowered to operators of CPUExecutionProvider,"
        " which have no slots"
    ]
    with pytest.raises(ValueError, match="gpu_budget must be a number of bytes"):
        moe_infer.InferenceSession(path, providers=CPU, gpu_budget="1K cats")


def test_a_model_without_layers_takes_a_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    info = [onnx.helper.make_tensor_value_info(n, 1, [2]) for n in "xy"]
    graph = onnx.helper.make_graph([node], "g", info[:1], info[1:])
    opsets = [onnx.helper.make_opsetid("", 18)]
    onnx.save(
        onnx.helper.make_model(graph, ir_version=9, opset_imports=opsets), tmp_path / "m.onnx"
    )
    monkeypatch.setenv(VARIABLE, "1K")
    made = moe_infer.InferenceSession(tmp_path / "m.onnx", providers=CPU)
    assert made.run(None, {"x": np.array([-1, 2], np.float32)})[0].tolist() == [0, 2]
    assert not caplog.records
