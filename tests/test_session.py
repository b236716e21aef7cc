"""moe_infer.InferenceSession: what runs a model, what it refuses, and what it says."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import moe_infer
from layer_models import (
    FORMATS,
    assert_close,
    config_of,
    layer_attributes,
    layer_model,
    make_parts,
    write_experts,
    write_layer,
)
from moe_infer import reference
from moe_infer.op import SUBLAYERS
from moe_infer.runtime import plugin, prepare, profiles, providers
from moe_infer.runtime.expert_use import count_expert_use
from moe_infer.runtime.once import Once
from moe_infer.runtime.options import get_entry
from moe_infer.runtime.profiles import make_profiles, parse_range
from moe_infer.weights import open_expert_weights, open_weight_file

D_MODEL, HIDDEN, EXPERTS = 16, 32, 4
CPU = ["CPUExecutionProvider"]
ROOT = Path(__file__).resolve().parent.parent
RNG = np.random.default_rng(11)
X = RNG.standard_normal((2, 5, D_MODEL)).astype(np.float32)
LOGITS = np.argsort(RNG.random((2, 5, EXPERTS)), axis=-1).astype(np.float32)
FEEDS = {"x": X, "logits": LOGITS}


def attributes_in(
    folder: Path,
    form: str = "safetensors stacked",
    sublayer: str = "Gated_SiLU",
    absolute: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """A layer whose weight file is named relative to the model's folder."""
    made = write_layer(
        folder / "experts", sublayer, "softmax_topk", EXPERTS, D_MODEL, HIDDEN, form=form, **more
    )
    if not absolute:
        made["expert_weight_file"] = Path(made["expert_weight_file"]).name
    return made


def saved(folder: Path, layers: list[dict[str, Any]], **more: Any) -> Path:
    path = folder / "model.onnx"
    onnx.save(layer_model(layers, D_MODEL, **more), path)
    return path


def expected_output(folder: Path, attributes: dict[str, Any]) -> np.ndarray[Any, Any]:
    config = config_of(attributes)
    return reference.moe_layer(X, config, open_expert_weights(config, base_dir=folder), LOGITS)


@pytest.fixture(autouse=True)
def not_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_said", Once())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("sublayer", ["T5_FF", "Gated_SiLU"])
def test_runs_what_the_reference_computes(tmp_path: Path, form: str, sublayer: str) -> None:
    attributes = attributes_in(tmp_path, form, sublayer)
    made = moe_infer.InferenceSession(saved(tmp_path, [attributes]), providers=CPU)
    assert isinstance(made, ort.InferenceSession)
    assert made.lowered
    assert made.moe_provider == "CPUExecutionProvider"
    assert made.get_providers() == CPU
    assert [layer.name for layer in made.moe_layers] == ["moe_0"]
    assert [output.name for output in made.get_outputs()] == ["y"]
    assert_close(made.run(None, FEEDS)[0], expected_output(tmp_path, attributes), "float32")
    assert_close(made.run(["y"], FEEDS)[0], expected_output(tmp_path, attributes), "float32")


def test_bytes_and_the_search_order_of_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attributes = attributes_in(tmp_path)
    data = saved(tmp_path, [attributes]).read_bytes()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with pytest.raises(FileNotFoundError, match=r"layer 'moe_0'.*experts.safetensors.*tried"):
        moe_infer.InferenceSession(data, providers=CPU)
    monkeypatch.setenv("MOE_INFER_WEIGHT_DIR", str(tmp_path))
    made = moe_infer.InferenceSession(data, providers=CPU)
    assert_close(made.run(None, FEEDS)[0], expected_output(tmp_path, attributes), "float32")


def test_deflated_experts_over_the_limit_are_given_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "EMBED_LIMIT", 0)
    attributes = attributes_in(tmp_path, "npz deflated")
    made = moe_infer.InferenceSession(saved(tmp_path, [attributes]), providers=CPU)
    assert_close(made.run(None, FEEDS)[0], expected_output(tmp_path, attributes), "float32")


def test_a_model_without_layers_is_left_to_onnx_runtime(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    info = [onnx.helper.make_tensor_value_info(n, 1, [2]) for n in "xy"]
    graph = onnx.helper.make_graph([node], "g", info[:1], info[1:])
    opsets = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, ir_version=9, opset_imports=opsets)
    onnx.save(model, tmp_path / "m.onnx")
    made = moe_infer.InferenceSession(tmp_path / "m.onnx", providers=CPU)
    assert made.moe_layers == []
    assert made.moe_provider is None
    assert not made.lowered
    assert made.run(None, {"x": np.array([-1, 2], np.float32)})[0].tolist() == [0, 2]


PREPACKING = "session.disable_prepacking"
FOLDER = "session.model_external_initializers_file_folder_path"


def test_the_callers_options_are_as_before(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    for name in ("a", "b", "a"):
        (tmp_path / name).mkdir(exist_ok=True)
        path = saved(tmp_path / name, [attributes_in(tmp_path / name)])
        made = moe_infer.InferenceSession(path, options, CPU)
        made.run(None, FEEDS)
        assert made.get_session_options().intra_op_num_threads == 1
        profile = Path(made.end_profiling())
        assert profile.parent == tmp_path and profile.exists()
        profile.unlink()
        assert not list(tmp_path.glob("profile*"))
    for key in (PREPACKING, FOLDER):
        with pytest.raises(RuntimeError):  # was never set
            options.get_session_config_entry(key)
    # And they serve a plain session of a model with external data beside it.
    moe_infer.lower(path, tmp_path / "lowered.onnx")
    ort.InferenceSession(tmp_path / "lowered.onnx", options, CPU).run(None, FEEDS)
    # ONNX Runtime would warn of an entry that is set twice.
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


def test_a_session_can_change_its_providers(tmp_path: Path) -> None:
    """ONNX Runtime makes the session again, with the options that it had."""
    made = moe_infer.InferenceSession(saved(tmp_path, [attributes_in(tmp_path)]), providers=CPU)
    expected = made.run(None, FEEDS)[0]
    made.set_providers(CPU)
    assert np.array_equal(made.run(None, FEEDS)[0], expected)


def test_options_that_cannot_be_copied_are_put_back(tmp_path: Path) -> None:
    """A model with operators of somebody else's may need the options' custom operators."""
    path = saved(tmp_path, [attributes_in(tmp_path)])
    model = onnx.load(path)
    model.opset_import.append(onnx.helper.make_opsetid("somebody.else", 1))
    onnx.save(model, path)
    options = ort.SessionOptions()
    options.add_session_config_entry(PREPACKING, "0")
    moe_infer.InferenceSession(path, options, CPU).run(None, FEEDS)
    assert options.get_session_config_entry(PREPACKING) == "0"
    assert options.get_session_config_entry(FOLDER) == ""


@pytest.mark.parametrize(
    ("form", "weights"),
    [("safetensors stacked", "float32"), ("npz stored", "float32"), ("npz stored", "float16")],
)
def test_only_used_experts_come_into_memory(tmp_path: Path, form: str, weights: str) -> None:
    """One of 32 experts is used: the process must stay far below the size of the file."""
    experts, d_model, hidden = 32, 512, 1360
    parts = {
        f"{e}/{part}": np.zeros(tensor.resolve_part_shape(d_model, hidden), weights)
        for e in range(experts)
        for tensor in SUBLAYERS["Gated_SiLU"].tensors
        for part in tensor.parts
    }
    path = write_experts(tmp_path / "big", parts, "Gated_SiLU", experts, form)
    attributes = layer_attributes(
        "Gated_SiLU", "topk_softmax", experts, d_model, hidden, 1, path, centroids=False
    )
    onnx.save(layer_model([attributes], d_model, rank=2), tmp_path / "big.onnx")
    code = f"""
import numpy as np, moe_infer, moe_infer.runtime.session
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return sum(int(l.split()[1]) for l in lines if l.startswith(("RssAnon", "RssFile"))) / 1024
logits = np.zeros((3, {experts}), np.float32)
logits[:, 5] = 1
before = resident()
session = moe_infer.InferenceSession({str(tmp_path / "big.onnx")!r}, providers={CPU!r})
session.run(None, {{"x": np.ones((3, {d_model}), np.float32), "logits": logits}})
print(resident() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    whole = path.stat().st_size / 2**20
    assert whole > 120
    # One expert is a 32nd; a session without any takes about 25 MiB.
    assert float(done.stdout) < whole / 2, f"{done.stdout} of {whole} MiB"


# --- Providers


def test_lowering_is_said_once_with_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: CPU)
    path = saved(tmp_path, [attributes_in(tmp_path)])
    with caplog.at_level(logging.WARNING, "moe_infer"):
        for _ in range(3):
            moe_infer.InferenceSession(path)
    assert [r.name for r in caplog.records] == ["moe_infer"]
    assert "has no TensorrtExecutionProvider" in caplog.text
    assert "CPUExecutionProvider" in caplog.text


def test_nothing_is_said_where_the_provider_was_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moe_infer.InferenceSession(saved(tmp_path, [attributes_in(tmp_path)]), providers=CPU)
    assert not caplog.records


ALL = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]


def usable(answer: bool) -> Any:
    return lambda: plugin.PluginStatus(answer, "the reason of the plugin")


@pytest.mark.parametrize(
    ("available", "plugin_usable", "gpus", "provider", "reason"),
    [
        (ALL, True, 1, ALL[0], ""),
        (ALL, False, 1, ALL[1], "the reason of the plugin"),
        (ALL, False, 0, ALL[2], "the reason of the plugin"),
        (ALL[1:], True, 1, ALL[1], "has no TensorrtExecutionProvider"),
        (ALL[2:], True, 1, ALL[2], "has no TensorrtExecutionProvider"),
    ],
)
def test_what_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
    available: list[str],
    plugin_usable: bool,
    gpus: int,
    provider: str,
    reason: str,
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: available)
    monkeypatch.setattr(plugin, "status", usable(plugin_usable))
    monkeypatch.setattr(plugin, "gpu_count", lambda: gpus)
    choice = providers.choose(None, True)
    assert choice.moe_provider == provider
    assert [name for name, _ in choice.providers] == ALL[ALL.index(provider) :]
    assert reason in choice.reason
    assert bool(reason) == bool(choice.reason)


def test_tensorrt_that_cannot_run_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, [attributes_in(tmp_path)])
    monkeypatch.setattr(ort, "get_available_providers", lambda: CPU)
    with pytest.raises(moe_infer.PluginError, match="TensorrtExecutionProvider was asked for"):
        moe_infer.InferenceSession(path, providers=["TensorrtExecutionProvider"])
    monkeypatch.setattr(ort, "get_available_providers", lambda: ALL)
    monkeypatch.setattr(plugin, "status", usable(False))
    with pytest.raises(moe_infer.PluginError, match="asked for, but the reason of the plugin"):
        moe_infer.InferenceSession(path, providers=ALL)


@pytest.mark.parametrize(
    ("providers", "options", "message"),
    [
        (["NoSuchProvider"], None, "NoSuchProvider was asked for, but this ONNX Runtime has"),
        ([], None, "providers is empty"),
        (CPU, [{}, {}], "providers has 1 entries, but provider_options has 2"),
        (None, [{}], "provider_options are given without providers"),
    ],
)
def test_providers_that_are_wrong(
    tmp_path: Path, providers: Any, options: Any, message: str
) -> None:
    path = saved(tmp_path, [attributes_in(tmp_path)])
    with pytest.raises(ValueError, match=message):
        moe_infer.InferenceSession(path, providers=providers, provider_options=options)


class Recorder:
    """Stands for ONNX Runtime's own session: keeps what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Any] = []

        def init(this: Any, model: Any, options: Any, *rest: Any, **more: Any) -> None:
            folder = get_entry(options, FOLDER)
            self.calls.append((model, folder, *rest, more))

        monkeypatch.setattr(ort.InferenceSession, "__init__", init)
        monkeypatch.setattr(ort, "get_available_providers", lambda: ALL)
        monkeypatch.setattr(plugin, "status", usable(True))


def test_only_what_the_plugin_said_meanwhile_is_added_to_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Library:
        said = b"something of an hour ago"

        def moe_infer_last_error(self) -> bytes:
            return self.said

        def moe_infer_clear_last_error(self) -> None:
            self.said = b""

    library = Library()
    says: list[bytes] = []

    def init(*_: Any, **__: Any) -> None:
        library.said = says[0] if says else library.said
        raise RuntimeError("no engine")

    monkeypatch.setattr(ort.InferenceSession, "__init__", init)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ALL)
    monkeypatch.setattr(plugin, "status", usable(True))
    monkeypatch.setattr(plugin, "load", lambda: library)
    path = saved(tmp_path, [attributes_in(tmp_path)])
    with pytest.raises(RuntimeError, match=r"^no engine$"):
        moe_infer.InferenceSession(path, providers=ALL)
    says.append(b"the weight file is gone")
    for _ in range(2):  # and again, when the same is said again
        with pytest.raises(RuntimeError, match="no engine; the plugin says: the weight file is"):
            moe_infer.InferenceSession(path, providers=ALL)


def test_what_goes_to_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An absolute weight path in memory, the ranges, and no fallback."""
    path = saved(tmp_path, [attributes_in(tmp_path)])
    recorder = Recorder(monkeypatch)
    made = moe_infer.InferenceSession(
        path,
        input_shapes={
            "batch": (1, 1, 2),
            "logits": ((1, 1, 4), (1, 8, 4), (2, 9, 4)),
            "seq": (1, 2, 3),
        },
    )
    assert made.moe_provider == ALL[0]
    assert not made.lowered
    ((model, _, names, options, more),) = recorder.calls
    assert names == ALL
    assert more == {"enable_fallback": 0}
    assert options[0] == {
        "trt_profile_min_shapes": "x:1x1x16,logits:1x1x4",
        "trt_profile_opt_shapes": "x:1x2x16,logits:1x8x4",
        "trt_profile_max_shapes": "x:2x3x16,logits:2x9x4",
    }
    parsed = onnx.ModelProto.FromString(model)
    (node,) = [n for n in parsed.graph.node if n.op_type == "MoELayer"]
    found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert found["expert_weight_file"].decode() == str(tmp_path / "experts.safetensors")


def test_tensorrt_gets_the_file_itself_where_the_plugin_finds_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, [attributes_in(tmp_path)])
    monkeypatch.setenv("MOE_INFER_WEIGHT_DIR", str(tmp_path))
    recorder = Recorder(monkeypatch)
    moe_infer.InferenceSession(path)
    assert recorder.calls[0][0] == path


def test_tensorrt_gets_the_folder_of_external_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = layer_model([attributes_in(tmp_path)], D_MODEL)
    bias = np.ones(300, np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(bias, "bias"))
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="own.data", size_threshold=0)
    recorder = Recorder(monkeypatch)
    moe_infer.InferenceSession(path)
    parsed = onnx.ModelProto.FromString(recorder.calls[0][0])
    entries = {e.key: e.value for e in parsed.graph.initializer[0].external_data}
    assert entries["location"] == "own.data"
    assert Path(recorder.calls[0][1]) == tmp_path.resolve()


# --- Errors at creation, each naming the layer


def spoil_truncated(folder: Path, attributes: dict[str, Any]) -> None:
    path = folder / attributes["expert_weight_file"]
    path.write_bytes(path.read_bytes()[:-40])


def spoil_missing_file(folder: Path, attributes: dict[str, Any]) -> None:
    (folder / attributes["expert_weight_file"]).unlink()


def setting(**changes: Any) -> Any:
    return lambda folder, attributes: attributes.update(changes)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (spoil_missing_file, FileNotFoundError, "not found; tried"),
        (spoil_truncated, moe_infer.WeightFileError, "experts.safetensors"),
        (setting(expert_count=3), ValueError, "expert_count"),
        (setting(hidden_size=HIDDEN + 1), moe_infer.WeightFileError, "hidden_size 33"),
        (setting(expert_sublayer_type="Nope"), ValueError, "'expert_sublayer_type' is 'Nope'"),
        (setting(moe_variant="nope"), ValueError, "'moe_variant' is 'nope'"),
        (setting(max_concurrency=0), ValueError, "'max_concurrency' must be at least 1, got 0"),
        (setting(top_k=5), ValueError, "'top_k' is 5"),
        (setting(expert_weight_digest="0-1"), moe_infer.WeightFileError, "digest"),
        (setting(expert_weight_prefix="p/"), moe_infer.WeightFileError, "missing"),
        (setting(nonsense=1), ValueError, "unknown attribute 'nonsense'"),
        (setting(embedding_size=7), ValueError, "'embedding_size' is 7"),
    ],
)
def test_one_clear_error_names_the_layer(
    tmp_path: Path, spoil: Any, error: type[Exception], message: str
) -> None:
    attributes = attributes_in(tmp_path)
    spoil(tmp_path, attributes)
    path = saved(tmp_path, [attributes])
    with pytest.raises(error, match=message) as caught:
        moe_infer.InferenceSession(path, providers=CPU)
    assert str(caught.value).startswith("layer 'moe_0': ")
    assert "\n" not in str(caught.value)


def test_centroids_that_do_not_fit(tmp_path: Path) -> None:
    attributes = attributes_in(tmp_path)
    attributes["expert_centroids"] = [0.0] * (D_MODEL * EXPERTS + EXPERTS)
    path = saved(tmp_path, [attributes])
    with pytest.raises(ValueError, match=r"layer 'moe_0'.*'expert_centroids' must have"):
        moe_infer.InferenceSession(path, providers=CPU)


def test_an_input_of_another_type(tmp_path: Path) -> None:
    model = layer_model([attributes_in(tmp_path)], D_MODEL)
    model.graph.node[0].attribute[0].i = onnx.TensorProto.DOUBLE
    model.graph.value_info[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"layer 'moe_0'.*type DOUBLE; expected one of float32"):
        moe_infer.InferenceSession(tmp_path / "model.onnx", providers=CPU)


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model file '.*none.onnx' not found"):
        moe_infer.InferenceSession(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("this is no model")
    with pytest.raises(ValueError, match="is no ONNX model"):
        moe_infer.InferenceSession(tmp_path / "text.onnx")


# --- Expert use


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_expert_use(tmp_path: Path, dtype: str) -> None:
    attributes = attributes_in(tmp_path)
    second = {**attributes, "moe_variant": "default", "top_k": 1}
    second["expert_centroids"] = np.eye(D_MODEL, EXPERTS).reshape(-1).tolist()
    path = saved(tmp_path, [attributes, second], dtype=dtype)
    made = moe_infer.InferenceSession(path, providers=CPU, expert_use=True)
    with pytest.raises(ValueError, match="did not run yet"):
        _ = made.expert_use
    assert [output.name for output in made.get_outputs()] == ["y"]
    values = made.run(None, FEEDS)
    assert len(values) == 1
    first, other = made.expert_use
    chosen = np.argsort(-LOGITS.reshape(-1, EXPERTS), axis=1)[:, :2]
    assert first.layer == "moe_0"
    assert first.tokens.tolist() == np.bincount(chosen.reshape(-1), minlength=EXPERTS).tolist()
    assert first.used == np.count_nonzero(first.tokens)
    assert other.tokens.sum() == 10
    if dtype == "float32":
        config = config_of(attributes)
        middle = reference.moe_layer(
            X, config, open_expert_weights(config, base_dir=tmp_path), LOGITS
        )
        best = middle[..., :EXPERTS].argmax(-1).reshape(-1)
        assert other.tokens.tolist() == np.bincount(best, minlength=EXPERTS).tolist()
    by_path = count_expert_use(path, FEEDS)
    assert [use.tokens.tolist() for use in by_path] == [
        first.tokens.tolist(),
        other.tokens.tolist(),
    ]


def test_expert_use_that_was_not_asked_for(tmp_path: Path) -> None:
    made = moe_infer.InferenceSession(saved(tmp_path, [attributes_in(tmp_path)]), providers=CPU)
    with pytest.raises(ValueError, match="made without expert_use=True"):
        count_expert_use(made, FEEDS)


# --- Ranges of shapes

INPUTS = {"a": ["n", 8], "b": ["n", None], "c": [3]}


def test_ranges() -> None:
    found = make_profiles(INPUTS, {"n": (1, 2, 4), "b": ((1, 1), (2, 5), (4, 9))})
    assert found.shapes == {
        "a": ((1, 8), (2, 8), (4, 8)),
        "b": ((1, 1), (2, 5), (4, 9)),
    }
    assert found.provider_options()["trt_profile_opt_shapes"] == "a:2x8,b:2x5"


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"z": (1, 2, 3)}, "no input has a dimension 'z'; symbolic dimensions are n"),
        ({"z": ((1,), (1,), (1,))}, "the model has no input 'z'; it has a, b, c"),
        ({"n": (3, 2, 4)}, "smallest to the largest"),
        ({"n": (1, 2)}, "must have three shapes"),
        ({"n": "1x2"}, "must have three shapes"),
        ({"n": (1, 2, 4)}, "'b' .* is dynamic and has no range"),
        ({"a": ((1, 8), (2, 7), (3, 8))}, "the usual shape .2, 7. does not fit input 'a'"),
        ({"a": ((1,), (2, 8), (3, 8))}, "the smallest shape"),
        ({"a": ((4, 8), (2, 8), (3, 8))}, "smallest to the largest"),
        ({"a": ((-1, 8), (2, 8), (3, 8))}, "must have three shapes"),
    ],
)
def test_ranges_that_are_wrong(ranges: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_profiles(INPUTS, ranges)


def test_ranges_are_checked_on_every_provider(tmp_path: Path) -> None:
    path = saved(tmp_path, [attributes_in(tmp_path)])
    with pytest.raises(ValueError, match="no input has a dimension 'sequence'"):
        moe_infer.InferenceSession(path, providers=CPU, input_shapes={"sequence": (1, 2, 3)})


def test_ranges_from_text() -> None:
    assert parse_range("1,16,128") == (1, 16, 128)
    assert parse_range("1x1,1x16,4x128") == ((1, 1), (1, 16), (4, 128))
    for text in ("", "1", "1,2", "1x1,1x16", "a,b,c", "1,-2,3", "1x,1,1"):
        with pytest.raises(ValueError, match="a range must be three shapes"):
            parse_range(text)


def test_the_environment_asks_for_checks_of_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = make_parts("Gated_SiLU", EXPERTS, D_MODEL, HIDDEN, "float32")
    parts["1/down_weight"][2, 3] = np.nan
    path = write_experts(tmp_path / "experts", parts, "Gated_SiLU", EXPERTS, "npz stored")
    attributes = layer_attributes(
        "Gated_SiLU", "softmax_topk", EXPERTS, D_MODEL, HIDDEN, 2, path, False
    )
    model = layer_model([attributes], D_MODEL)
    moe_infer.InferenceSession(model.SerializeToString(), providers=CPU)
    monkeypatch.setenv("MOE_INFER_CHECK_FINITE", "1")
    with pytest.raises(moe_infer.WeightFileError, match=r"'1/down_weight' holds nan at \[2, 3\]"):
        moe_infer.InferenceSession(model.SerializeToString(), providers=CPU)
    monkeypatch.setenv("MOE_INFER_CHECK_FINITE", "no")
    with pytest.raises(ValueError, match="MOE_INFER_CHECK_FINITE must be 1"):
        moe_infer.InferenceSession(model.SerializeToString(), providers=CPU)
    monkeypatch.delenv("MOE_INFER_CHECK_FINITE")

    whole = bytearray(path.read_bytes())
    whole[open_weight_file(path).tensors["0/up_weight"].offset] ^= 1
    path.write_bytes(whole)
    moe_infer.InferenceSession(model.SerializeToString(), providers=CPU)
    monkeypatch.setenv("MOE_INFER_CHECK_CRC", "1")
    with pytest.raises(moe_infer.WeightFileError, match=r"'0/up_weight\.npy' are damaged \(CRC"):
        moe_infer.InferenceSession(model.SerializeToString(), providers=CPU)


# --- Symbolic dimensions in sums, and runs outside the ranges


def test_ranges_of_sums() -> None:
    inputs = {"ids": ["batch", "seq"], "mask": ["batch", "past + seq"], "key": ["batch", 2, "past"]}
    found = make_profiles(inputs, {"batch": (1, 1, 2), "seq": (1, 4, 9), "past": (0, 5, 100)})
    assert found.shapes["mask"] == ((1, 1), (1, 9), (2, 109))
    assert found.shapes["key"] == ((1, 2, 0), (1, 2, 5), (2, 2, 100))
    assert "mask 1x1 to 2x109, usually 1x9" in str(found)
    left = make_profiles({"x": ["total - past"]}, {"total": (4, 6, 8), "past": (1, 2, 3)})
    assert left.shapes["x"] == ((1,), (4,), (7,))
    with pytest.raises(ValueError, match=r"symbolic dimensions are batch, past, past \+ seq, seq"):
        make_profiles(inputs, {"length": (1, 1, 1)})


def test_ranges_of_values_at_which_the_graph_is_cut() -> None:
    """An operator that TensorRT has not gives a value to what comes after it."""
    nodes = [
        onnx.helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft"),
        onnx.helper.make_node("Gelu", ["x"], ["z"], domain="com.microsoft"),
        onnx.helper.make_node("Add", ["y", "z"], ["s"]),
    ]
    make = onnx.helper.make_tensor_value_info
    infos = [make("y", 1, ["n * seq", 8]), make("z", 1, ["other", 8]), make("s", 1, ["n", 8])]
    graph = onnx.helper.make_graph(
        nodes, "g", [make("x", 1, ["n", "seq", 8])], [], value_info=infos
    )
    ranges = {"n": (1, 2, 4), "seq": (1, 3, 5)}
    inputs = make_profiles({"x": ["n", "seq", 8]}, ranges)
    found = profiles.border_profiles(onnx.helper.make_model(graph), ranges, inputs)
    assert found.shapes == {
        "x": ((1, 1, 8), (2, 3, 8), (4, 5, 8)),
        "y": ((1, 8), (6, 8), (20, 8)),
    }


def test_tensorrt_gets_the_layers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operator of the rest is excluded, in branches too, and the cuts get ranges."""
    path = saved(tmp_path, [attributes_in(tmp_path)])
    model = onnx.load(path)
    (layer,) = [n for n in model.graph.node if n.op_type == "MoELayer"]
    hidden = layer.input[0]
    parsed = onnx.parser.parse_graph(
        "g (float[batch, seq, 16] x) => (float[batch, seq, 16] b) {"
        " t = Constant <value = bool {1}> ()"
        " a = If (t) <then_branch = th () => (float[batch, seq, 16] p) { p = Sin (x) },"
        " else_branch = el () => (float[batch, seq, 16] q) { q = Cos (x) }>"
        " b = Identity (a) }"
    )
    layer.input[0] = "b"
    for node in reversed(parsed.node):
        for i, name in enumerate(node.input):
            node.input[i] = hidden if name == "x" else name
        for attribute in node.attribute:
            for inner in attribute.g.node:
                inner.input[0] = hidden
        model.graph.node.insert(0, node)
    info = onnx.helper.make_tensor_value_info("b", 1, ["batch", "seq", 16])
    model.graph.value_info.append(info)
    onnx.save(model, path)
    recorder = Recorder(monkeypatch)
    given = [{"trt_op_types_to_exclude": "TopK,Sin", "trt_fp16_enable": "0"}, {}, {}]
    ranges = {"batch": (1, 1, 2), "seq": (1, 2, 3)}
    moe_infer.InferenceSession(
        path, providers=ALL, provider_options=given, dims=ranges, layers_only=True
    )
    ((_, _, _, (options, *_), _),) = recorder.calls
    excluded = options["trt_op_types_to_exclude"].split(",")
    assert excluded[:2] == ["TopK", "Sin"] and options["trt_fp16_enable"] == "0"
    rest = {n.op_type for n in model.graph.node if n.op_type != "MoELayer"}
    assert set(excluded) == rest | {"TopK", "Sin", "Cos"} and len(set(excluded)) == len(excluded)
    assert "b:1x1x16" in options["trt_profile_min_shapes"].split(",")
    assert "MoELayer" not in excluded


def test_a_run_without_an_engine_says_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, [attributes_in(tmp_path)])
    Recorder(monkeypatch)
    session = moe_infer.InferenceSession(path, providers=ALL)
    says = ["EP failed to create engine from network."]

    def run(*_: Any) -> None:
        raise RuntimeError(says[0])

    monkeypatch.setattr(ort.InferenceSession, "run", run)
    with pytest.raises(RuntimeError, match=r"network\.; TensorRT cannot build.*layers_only=True"):
        session.run(None, {})
    says[0] = "something else"
    with pytest.raises(RuntimeError, match=r"^something else$"):
        session.run(None, {})


def test_a_growing_sequence_is_told_once() -> None:
    watch = profiles.ShapeWatch({"x": [1, "seq"], "fixed": [3]}, None)
    assert watch.look({"x": (1, 5), "fixed": (3,)}) == ""
    assert watch.look({"x": (1, 5)}) == ""
    assert "input 'x' has shape (1, 6), outside of what came before" in watch.look({"x": (1, 6)})
    assert watch.look({"x": (1, 7)}) == ""


def test_a_run_outside_the_ranges_is_an_error() -> None:
    inputs = {"x": [1, "seq"]}
    watch = profiles.ShapeWatch(inputs, make_profiles(inputs, {"seq": (1, 4, 8)}))
    assert watch.look({"x": (1, 8)}) == ""
    for shape in ((1, 9), (1, 0), (1,)):
        with pytest.raises(ValueError, match=r"was made for \(1, 1\) to \(1, 8\)"):
            watch.look({"x": shape})


def test_dims_go_to_tensorrt_and_are_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(tmp_path, [attributes_in(tmp_path)])
    recorder = Recorder(monkeypatch)
    with caplog.at_level(logging.INFO, "moe_infer"):
        made = moe_infer.InferenceSession(path, dims={"batch": (1, 1, 8), "seq": (1, 4, 64)})
    ((_, _, _, options, _),) = recorder.calls
    assert options[0]["trt_profile_max_shapes"] == "x:8x64x16,logits:8x64x4"
    assert made.profiles is not None
    assert "TensorRT builds its engine for x 1x1x16 to 8x64x16" in caplog.text
    with pytest.raises(ValueError, match=r"x' has shape \(9, 2, 16\)"):
        made.run(None, {"x": np.zeros((9, 2, 16), np.float32)})
    with pytest.raises(ValueError, match="dims: 'seq' must have three numbers"):
        moe_infer.InferenceSession(path, dims={"seq": (1, 2)})
    with pytest.raises(ValueError, match="both in input_shapes and in dims"):
        moe_infer.InferenceSession(path, input_shapes={"seq": (1, 2, 3)}, dims={"seq": (1, 2, 3)})


def test_a_session_without_ranges_warns_when_the_sequence_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(tmp_path, [attributes_in(tmp_path)])
    Recorder(monkeypatch)
    monkeypatch.setattr(ort.InferenceSession, "run", lambda *_: [])
    made = moe_infer.InferenceSession(path)
    with caplog.at_level(logging.WARNING, "moe_infer"):
        for length in (2, 3, 4):
            made.run(None, {"x": np.zeros((1, length, 16)), "logits": np.zeros((1, length, 4))})
    assert caplog.text.count("TensorRT builds its engine again") == 1


def test_on_the_cpu_every_length_is_as_good(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(tmp_path, [attributes_in(tmp_path)])
    made = moe_infer.InferenceSession(
        path, providers=CPU, dims={"batch": (1, 1, 1), "seq": (1, 1, 1)}
    )
    assert made.profiles is None
    for length in (1, 5):
        made.run(None, {n: a[:1, :length] for n, a in FEEDS.items()})
    assert "TensorRT builds" not in caplog.text


@pytest.mark.needs_onnxruntime_1_32
def test_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from moe_infer.cli import main
    from moe_infer.runtime.plan import plan

    two = [attributes_in(tmp_path), {**attributes_in(tmp_path)}]
    path = saved(tmp_path, two)
    told = plan(path, CPU)
    assert told.lowered
    assert told.layers == {"moe_0": CPU, "moe_1": CPU}
    (part,) = told.parts
    assert part.provider == CPU[0]
    assert part.operators["com.microsoft.MoE"] == 2
    assert sum(part.operators.values()) == len(part.nodes) == part.parts
    assert main(["inspect", str(path), "--plan", "--provider", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "2 com.microsoft.MoE" in shown
    assert "moe_1: CPUExecutionProvider, lowered to standard operators" in shown
    assert main(["inspect", str(path), "--plan", "--provider", "cpu", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["providers"][0]["operators"]["com.microsoft.MoE"] == 2
