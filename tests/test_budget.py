"""A budget of GPU memory: how it is split, and what a model with it is."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import moe_infer
from layer_models import layer_model, write_layer
from moe_infer.budget import Budget, LayerSlots, split_budget
from moe_infer.cli import main
from moe_infer.graph.lower_nodes import load_model, read_layers
from moe_infer.graph.replace import digest_name
from moe_infer.graph.update import update_layers, with_slots

ROOT = Path(__file__).resolve().parent.parent
EXPORTED = ROOT / "examples/tiny_moe/gated_top2.onnx"
D_MODEL, HIDDEN = 16, 32
CPU = ["CPUExecutionProvider"]
SLOT = 2 * HIDDEN * D_MODEL * 4 + D_MODEL * HIDDEN * 4  # of Gated_SiLU in float32; no padding

LAYER = st.builds(
    LayerSlots,
    st.just("layer"),
    st.integers(1, 40),
    st.integers(1, 50),
    st.one_of(st.just(0), st.integers(1, 64).map(lambda n: 256 * n)),
)
LAYERS = st.lists(LAYER, max_size=8)


def fewest(layer: LayerSlots) -> int:
    return min(layer.top_k, layer.experts) if layer.slot_bytes else 0


def split_by_hand(budget: int, layers: list[LayerSlots]) -> list[int]:
    """The rule as it is told, one slot at a time."""
    slots = [fewest(layer) for layer in layers]
    while True:
        open_layers = [
            i for i, layer in enumerate(layers) if layer.slot_bytes and slots[i] < layer.experts
        ]
        if not open_layers:
            return slots
        best = min(open_layers, key=lambda i: (Fraction(slots[i], layers[i].experts), i))
        slots[best] += 1
        if sum(n * layer.slot_bytes for n, layer in zip(slots, layers, strict=True)) > budget:
            slots[best] -= 1
            return slots


def slots_of(budget: Budget) -> list[int]:
    return [layer.slots for layer in budget.layers]


@given(LAYERS, st.integers(0, 1 << 22))
def test_the_split(layers: list[LayerSlots], more: int) -> None:
    least = split_budget("1T", layers).least
    found = split_budget(least + more, layers)
    assert slots_of(found) == split_by_hand(least + more, layers)
    assert found.nbytes <= found.given == least + more
    for layer, given_layer in zip(found.layers, layers, strict=True):
        assert fewest(given_layer) <= layer.slots <= layer.experts
    lacking = [x for x in found.layers if x.slot_bytes and x.slots < x.experts]
    if lacking:
        assert found.given - found.nbytes < max(x.slot_bytes for x in lacking)
    else:
        assert found.nbytes == found.whole


@given(LAYERS, st.integers(0, 1 << 22))
def test_shares_are_even(layers: list[LayerSlots], more: int) -> None:
    """What a layer got beyond the fewest, it got while no other had a smaller share."""
    found = split_budget(split_budget("1T", layers).least + more, layers)
    weighty = [layer for layer in found.layers if layer.slot_bytes]
    for a in weighty:
        for b in weighty:
            if a.slots > fewest(a) and b.slots < b.experts:
                assert Fraction(a.slots - 1, a.experts) <= Fraction(b.slots, b.experts)


@given(LAYERS, st.integers(0, 1 << 22), st.integers(0, 1 << 16))
def test_more_is_never_less(layers: list[LayerSlots], more: int, still_more: int) -> None:
    least = split_budget("1T", layers).least
    small = split_budget(least + more, layers)
    large = split_budget(least + more + still_more, layers)
    assert all(a <= b for a, b in zip(slots_of(small), slots_of(large), strict=True))


@given(LAYERS)
def test_the_ends(layers: list[LayerSlots]) -> None:
    assume(any(layer.slot_bytes for layer in layers))
    every = split_budget("1T", layers)
    assert slots_of(every) == [x.experts if x.slot_bytes else 0 for x in layers]
    assert (every.nbytes, every.share) == (every.whole, 1)
    assert slots_of(split_budget(every.whole, layers)) == slots_of(every)
    assert slots_of(split_budget(every.least, layers)) == [fewest(x) for x in layers]
    with pytest.raises(ValueError, match=rf"give at least {every.least} \("):
        split_budget(every.least - 1, layers)


def test_a_quarter_of_a_large_model() -> None:
    layers = [LayerSlots(f"layer {i}", 128, 8, 9 << 20) for i in range(48)]
    whole = 48 * 128 * (9 << 20)
    found = split_budget(whole // 4, layers)
    assert slots_of(found) == [32] * 48
    assert found.share == 0.25
    # The first layers get what no longer suffices for all.
    assert slots_of(split_budget(whole // 4 + (20 << 20), layers)) == [33] * 2 + [32] * 46


def test_layers_of_different_sizes_get_the_same_share() -> None:
    layers = [LayerSlots("a", 8, 2, 1 << 20), LayerSlots("b", 64, 2, 256), LayerSlots("c", 4, 1, 0)]
    found = split_budget((4 << 20) + 40 * 256, layers)
    assert slots_of(found) == [4, 32, 0]
    assert [layer.share for layer in found.layers] == [0.5, 0.5, 1]
    # Among equal shares the first layer is next; when its slot does not fit the split ends.
    assert found.given - found.nbytes == 8 * 256


def test_too_little_says_what_would_do() -> None:
    layers = [LayerSlots("a", 8, 2, 1 << 20), LayerSlots("b", 8, 4, 1 << 20)]
    with pytest.raises(ValueError) as caught:
        split_budget("1M", layers, "--gpu-budget")
    assert str(caught.value) == (
        "--gpu-budget: 1048576 bytes (1.0 MiB) of GPU memory do not hold the experts of one token"
        " in each of 2 layers; give at least 6291456 (6.0 MiB)"
    )
    assert split_budget(6291456, layers).nbytes == 6291456
    with pytest.raises(ValueError, match=r"gpu_budget must be a number of bytes .* got '8 cats'"):
        split_budget("8 cats", layers)


# --- Models


def save_model(folder: Path, experts: tuple[int, ...] = (8, 4), **more: Any) -> Path:
    """A chain of layers whose weight files lie beside the model; the last gives the output."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = []
    for i, count in enumerate(experts):
        made = write_layer(
            folder / f"experts_{i}",
            "Gated_SiLU",
            "softmax_topk",
            count,
            D_MODEL,
            HIDDEN,
            centroids=True,
            **more,
        )
        layers.append({**made, "expert_weight_file": Path(made["expert_weight_file"]).name})
    onnx.save(layer_model(layers, D_MODEL), folder / "model.onnx")
    return folder / "model.onnx"


def layers_in(path: Path) -> list[Any]:
    return read_layers(*load_model(path))


def outputs_of(path: Path) -> Any:
    x = np.random.default_rng(3).standard_normal((2, 3, D_MODEL)).astype(np.float32)
    return moe_infer.InferenceSession(path, providers=CPU).run(None, {"x": x})[0]


def test_what_inspect_tells_can_be_split(tmp_path: Path) -> None:
    infos = moe_infer.inspect_model(save_model(tmp_path))
    assert [info.slot_bytes for info in infos] == [SLOT, SLOT]
    found = split_budget(9 * SLOT, infos)
    assert [(x.name, x.slots) for x in found.layers] == [("moe_0", 6), ("moe_1", 3)]


def test_setting_a_budget_in_a_file(tmp_path: Path) -> None:
    path = save_model(tmp_path)
    before, plain = path.read_bytes(), outputs_of(path)
    out = tmp_path / "small.onnx"
    budget = moe_infer.set_gpu_budget(path, 6 * SLOT, out)
    assert path.read_bytes() == before
    layers = layers_in(out)
    assert [x.config.max_concurrency for x in layers] == slots_of(budget) == [4, 2]
    # The second layer had 2 slots before: what does not change keeps its name.
    assert layers[0].node.output[0] == digest_name("h1", layers[0].config)
    assert layers[1].node.output[0] == "h2"
    onnx.checker.check_model(onnx.load(out))
    assert np.array_equal(outputs_of(out), plain)
    # Again, over itself: the digests take the place of the old ones.
    moe_infer.set_gpu_budget(out, 12 * SLOT, out)
    again = layers_in(out)
    assert [x.config.max_concurrency for x in again] == [8, 4]
    assert [x.node.output[0].count(".moe_") for x in again] == [1, 1]
    assert np.array_equal(outputs_of(out), plain)


def test_a_digest_for_each_budget(tmp_path: Path) -> None:
    path = save_model(tmp_path)
    found = set()
    for slots in (4, 6, 9, 12):
        moe_infer.set_gpu_budget(path, slots * SLOT, tmp_path / "out.onnx")
        found.add(tuple(x.node.output[0] for x in layers_in(tmp_path / "out.onnx")))
    assert len(found) == 4
    moe_infer.set_gpu_budget(path, 9 * SLOT + 5, tmp_path / "out.onnx")
    found.add(tuple(x.node.output[0] for x in layers_in(tmp_path / "out.onnx")))
    assert len(found) == 4, "the same slots are the same model"


def test_a_layer_that_gives_the_graphs_output(tmp_path: Path) -> None:
    path = save_model(tmp_path, (8,))
    model = onnx.load(path)
    del model.graph.node[-1]
    model.graph.node[-1].output[0] = "y"
    del model.graph.value_info[:]
    onnx.save(model, path)
    plain = outputs_of(path)
    for slots in (3, 5):
        moe_infer.set_gpu_budget(path, slots * SLOT, path)
        changed = onnx.load(path)
        (node,) = [n for n in changed.graph.node if n.op_type == "MoELayer"]
        assert node.output[0].startswith("y.moe_")
        assert [o.name for o in changed.graph.output] == ["y"]
        (info,) = [i for i in changed.graph.value_info if i.name == node.output[0]]
        assert [d.dim_value or d.dim_param for d in info.type.tensor_type.shape.dim] == [
            "batch",
            "seq",
            D_MODEL,
        ]
        assert np.array_equal(outputs_of(path), plain)


def test_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are found from there: the experts in their place, other data by a link."""
    path = save_model(tmp_path / "a")
    model = onnx.load(path)
    bias = np.arange(D_MODEL, dtype=np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(bias, "bias"))
    model.graph.node[-1].output[0] = "before_bias"
    model.graph.node.append(onnx.helper.make_node("Add", ["before_bias", "bias"], ["y"], "add"))
    onnx.save(model, path, save_as_external_data=True, location="own.data", size_threshold=0)
    plain = outputs_of(path)
    out = tmp_path / "b" / "deep" / "model.onnx"
    moe_infer.set_gpu_budget(path, 6 * SLOT, out)
    assert np.array_equal(outputs_of(out), plain)
    for layer in layers_in(out):
        assert layer.config.expert_weight_file == str(layer.weights.file.path)
        assert layer.node.output[0] == digest_name(layer.node.output[0], layer.config)
    (link,) = set(out.parent.iterdir()) - {out}
    assert link.stat().st_ino == (tmp_path / "a" / "own.data").stat().st_ino
    # Where the plugin looks by itself, the path stays.
    monkeypatch.setenv("MOE_INFER_WEIGHT_DIR", str(tmp_path / "a"))
    moe_infer.set_gpu_budget(path, 6 * SLOT, out)
    assert layers_in(out)[0].config.expert_weight_file == "experts_0.safetensors"


def test_weights_are_not_written_over(tmp_path: Path) -> None:
    path = save_model(tmp_path)
    experts = tmp_path / "experts_0.safetensors"
    before = experts.read_bytes()
    with pytest.raises(ValueError, match=r"would overwrite weights of the model; give another out"):
        moe_infer.set_gpu_budget(path, "1G", experts)
    assert experts.read_bytes() == before
    with pytest.raises(ValueError, match=rf"give at least {4 * SLOT} "):
        moe_infer.set_gpu_budget(path, 4 * SLOT - 1, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    info = [onnx.helper.make_tensor_value_info(n, 1, [2]) for n in "xy"]
    graph = onnx.helper.make_graph([node], "g", info[:1], info[1:])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "none.onnx")
    with pytest.raises(ValueError, match=r"none\.onnx' has no MoELayer"):
        moe_infer.set_gpu_budget(tmp_path / "none.onnx", "1G", tmp_path / "out.onnx")


def test_an_output_name_that_is_taken(tmp_path: Path) -> None:
    """The new name must not be another value's."""
    model, folder = load_model(save_model(tmp_path))
    layers = read_layers(model, folder)
    configs = [with_slots(layer, 3) for layer in layers]
    taken = digest_name("h1", configs[0])
    model.graph.node.append(onnx.helper.make_node("Relu", ["x"], [taken], "relu"))
    updated = update_layers(model, layers, configs)
    outputs = [o for node in model.graph.node for o in node.output]
    assert len(outputs) == len(set(outputs))
    assert taken in outputs
    assert model.graph.node[updated[1].index].input[0] == updated[0].node.output[0] != taken


def test_slots_that_mean_the_same_change_nothing(tmp_path: Path) -> None:
    model, folder = load_model(save_model(tmp_path, max_concurrency=99))
    layers = read_layers(model, folder)
    before = model.SerializeToString(deterministic=True)
    update_layers(model, layers, [with_slots(x, x.config.expert_count) for x in layers])
    assert model.SerializeToString(deterministic=True) == before


# --- Rewriting


def test_rewriting_with_a_budget(tmp_path: Path) -> None:
    whole = moe_infer.rewrite(EXPORTED, tmp_path / "whole", progress=False)
    infos = moe_infer.inspect_model(tmp_path / "whole" / "model.onnx")
    nbytes = sum(info.slots_bytes for info in infos)
    moe_infer.rewrite(EXPORTED, tmp_path / "half", gpu_budget=nbytes // 2, progress=False)
    half = layers_in(tmp_path / "half" / "model.onnx")
    expected = split_budget(nbytes // 2, infos)
    assert [x.config.max_concurrency for x in half] == slots_of(expected)
    assert 0.4 < expected.share <= 0.5
    assert {x.node.output[0] for x in half}.isdisjoint(x.output for x in whole.layers)
    # The same as a budget that is set later.
    moe_infer.set_gpu_budget(
        tmp_path / "whole" / "model.onnx", nbytes // 2, tmp_path / "whole" / "later.onnx"
    )
    later = layers_in(tmp_path / "whole" / "later.onnx")
    assert [x.node.output[0] for x in later] == [x.node.output[0] for x in half]


def test_rewriting_with_a_budget_that_is_wrong(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(
        ValueError, match="do not hold the experts of one token in each of 4 layers"
    ):
        moe_infer.rewrite(EXPORTED, out, gpu_budget=1000, progress=False)
    with pytest.raises(ValueError, match="max_concurrency 2 and gpu_budget '1G' are both given"):
        moe_infer.rewrite(EXPORTED, out, gpu_budget="1G", max_concurrency=2, progress=False)
    with pytest.raises(ValueError, match="gpu_budget must be a number of bytes"):
        moe_infer.rewrite(EXPORTED, out, gpu_budget="much", progress=False)
    assert not out.exists()


# --- Command line


def test_inspect_shows_what_a_budget_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_model(tmp_path)
    before = path.read_bytes()
    assert main(["inspect", str(path), "--gpu-budget", str(6 * SLOT), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["gpu_budget"] == told["bytes"] == 6 * SLOT
    assert (told["least"], told["all_experts"], told["slots"]) == (4 * SLOT, 12 * SLOT, 6)
    assert [(x["name"], x["slots"], x["bytes"], x["share"]) for x in told["layers"]] == [
        ("moe_0", 4, 4 * SLOT, 0.5),
        ("moe_1", 2, 2 * SLOT, 0.5),
    ]
    assert main(["inspect", str(path), "--gpu-budget", "40K"]) == 0
    shown = capsys.readouterr().out
    for text in ("moe_0", "50.0 %", "the least that works: 24576 (24.0 KiB)", "workspace"):
        assert text in shown
    for given_text, message in (
        ("1K", "--gpu-budget: 1024 bytes (1.0 KiB) of GPU memory do not hold"),
        ("lots", "--gpu-budget must be a number of bytes such as 8G or 512M, got 'lots'"),
    ):
        assert main(["inspect", str(path), "--gpu-budget", given_text]) == 1
        assert message in capsys.readouterr().err
    assert main(["inspect", str(path), "--gpu-budget", "1G", "--plan"]) == 1
    assert "leave --plan and --tokens away" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_commands_that_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = save_model(tmp_path), tmp_path / "out.onnx"
    assert main(["budget", str(path), "--gpu-budget", str(6 * SLOT), "-o", str(out)]) == 0
    assert f"model: {out}" in capsys.readouterr().out
    assert [x.config.max_concurrency for x in layers_in(out)] == [4, 2]
    assert main(["budget", str(path), "--gpu-budget", "1", "-o", str(out)]) == 1
    assert f"give at least {4 * SLOT}" in capsys.readouterr().err
    rewritten = tmp_path / "rewritten"
    assert main(["rewrite", str(EXPORTED), str(rewritten), "--gpu-budget", "1G"]) == 0
    layers = layers_in(rewritten / "model.onnx")
    assert all(x.config.resident for x in layers)
    with pytest.raises(SystemExit):
        main(["rewrite", str(EXPORTED), "x", "--gpu-budget", "1G", "--max-concurrency", "2"])


def test_a_plain_session_takes_the_written_model(tmp_path: Path) -> None:
    """Lowered, since no plugin is needed for that: names and types fit each other."""
    path, out = save_model(tmp_path), tmp_path / "out.onnx"
    moe_infer.set_gpu_budget(path, 9 * SLOT, out)
    moe_infer.lower(out, tmp_path / "lowered.onnx")
    x = np.ones((1, 2, D_MODEL), np.float32)
    session = ort.InferenceSession(tmp_path / "lowered.onnx", providers=CPU)
    on_cpu = moe_infer.InferenceSession(path, providers=CPU)
    assert np.array_equal(session.run(None, {"x": x})[0], on_cpu.run(None, {"x": x})[0])
