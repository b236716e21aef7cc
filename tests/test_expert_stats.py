"""Counters of experts: the library's registry, sessions without a GPU, tables and pictures."""

from __future__ import annotations

import ctypes
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from rich.console import Console

import moe_infer
from layer_models import layer_attributes, layer_model, make_parts, write_experts
from moe_infer.cli import main
from moe_infer.graph.lower_nodes import load_model, read_layers
from moe_infer.runtime import native, plugin
from moe_infer.runtime.stats import ExpertStats, text
from moe_infer.runtime.stats.collect import from_report, of_library
from moe_infer.runtime.stats.picture import heat_matrices, save_heat_map

D_MODEL, HIDDEN, EXPERTS = 8, 16, 4
CPU = ["CPUExecutionProvider"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two layers, whose experts are under two prefixes of one file, on two copies of it."""
    attributes = []
    for i in range(2):
        parts = make_parts("Gated_SiLU", EXPERTS, D_MODEL, HIDDEN, "float32", seed=i)
        file = write_experts(tmp_path / f"experts{i}", parts, "Gated_SiLU", EXPERTS, "npz stored")
        attributes.append(
            layer_attributes(
                "Gated_SiLU", "softmax_topk", EXPERTS, D_MODEL, HIDDEN, 2, file.name, True
            )
        )
    path = tmp_path / "model.onnx"
    onnx.save(layer_model(attributes, D_MODEL), path)
    return path


def report(path: Path | str, **changes: Any) -> native.LayerReport:
    """What the library could say of a layer that streams."""
    stats = native.LayerStats(
        runs=10,
        tokens=20,
        hits=3,
        misses=9,
        evictions=7,
        bytes_fetched=9000,
        prefetches_used=2,
        prefetches_wasted=1,
        prefetch_bytes_used=1500,
        prefetch_bytes_wasted=200,
        stall_ns=-1,
    )
    values: dict[str, Any] = {
        "id": 1,
        "weight_file": str(path),
        "weight_prefix": "",
        "sublayer_type": "Gated_SiLU",
        "device": 0,
        "streams": True,
        "expert_count": EXPERTS,
        "slots": 2,
        "slot_bytes": 1000,
        "stats": stats,
        "uses": np.array([10, 2, 0, 0]),
        "slot_of_expert": np.array([1, -1, 0, -1], np.int32),
    }
    return native.LayerReport(**{**values, **changes})


# --- The library


@pytest.mark.needs_library
def test_without_layers_there_is_nothing_to_visit() -> None:
    assert native.live_layers() == []
    assert moe_infer.expert_stats() == []


@pytest.mark.needs_library
def test_a_visitor_must_be_given() -> None:
    library = plugin.load()
    library.moe_infer_visit_layers.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    try:
        assert library.moe_infer_visit_layers(None, None) != 0
        assert b"visit must not be NULL" in library.moe_infer_last_error()
    finally:
        library.moe_infer_visit_layers.argtypes = native._SIGNATURES["moe_infer_visit_layers"]


@pytest.mark.needs_library
def test_a_layer_must_be_given() -> None:
    with pytest.raises(ValueError, match="moe_infer_layer_visit: layer must not be NULL"):
        native._visited(lambda visitor: native._call("moe_infer_layer_visit", None, visitor, None))


def test_a_report_outlives_the_visit() -> None:
    """The C structure as the library fills it, then overwritten as the library would."""
    uses = (ctypes.c_int64 * 3)(5, 0, 2)
    slots = (ctypes.c_int32 * 3)(0, -1, 1)
    given = native._Report(
        7, b"/tmp/\xff.npz", b"layer.", b"T5_FF", 1, 1, 3, 2, 64,
        native._Stats(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11),
        ctypes.cast(uses, ctypes.POINTER(ctypes.c_int64)),
        ctypes.cast(slots, ctypes.POINTER(ctypes.c_int32)),
    )  # fmt: skip
    (found,) = native._visited(lambda visitor: visitor(ctypes.pointer(given), None))
    uses[0], slots[0], given.expert_count = 99, 99, 0
    assert (found.id, found.weight_file, found.weight_prefix) == (7, "/tmp/\udcff.npz", "layer.")
    assert (found.device, found.streams, found.expert_count) == (1, True, 3)
    assert (found.slots, found.slot_bytes) == (2, 64)
    assert found.stats == native.LayerStats(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)
    assert found.uses is not None and found.uses.tolist() == [5, 0, 2]
    assert found.slot_of_expert is not None and found.slot_of_expert.tolist() == [0, -1, 1]
    given.uses = given.slot_of_expert = None
    (found,) = native._visited(lambda visitor: visitor(ctypes.pointer(given), None))
    assert found.uses is None and found.slot_of_expert is None


def test_an_error_in_a_visit_is_not_lost() -> None:
    given = native._Report(sublayer_type=b"\xff", weight_file=b"", weight_prefix=b"")
    with pytest.raises(UnicodeDecodeError):
        native._visited(lambda visitor: visitor(ctypes.pointer(given), None))


# --- From the library's reports to a session's layers


def test_a_layer_that_streams() -> None:
    found = from_report(report("/nowhere/w.npz", weight_prefix="moe."))
    assert found.name == "w.npz: moe."
    assert found.where == "CUDA device 0"
    assert found.hit_rate == pytest.approx(0.25)
    assert found.stall_s is None
    assert found.resident is not None and found.resident.tolist() == [True, False, True, False]
    record = json.loads(json.dumps(found.to_dict()))
    assert record["uses"] == [10, 2, 0, 0] and record["bytes_fetched"] == 9000


def test_what_a_resident_layer_does_not_count_is_none_and_not_zero() -> None:
    stats = native.LayerStats(4, 8, 0, 0, 0, 100, 0, 0, 0, 0, 1_500_000_000)
    found = from_report(report("w.npz", streams=False, stats=stats, uses=None))
    assert (found.runs, found.tokens, found.misses) == (4, 8, 0)
    assert found.hits is None and found.hit_rate is None and found.uses is None
    assert found.stall_s == 1.5


def test_a_sub_layer_without_weights_has_no_slots() -> None:
    found = from_report(report("", sublayer_type="Identity", slots=0, slot_of_expert=None))
    assert found.name == "Identity #1"
    assert found.slots is None and found.slot_bytes is None and found.resident is None


def test_layers_are_found_by_file_and_prefix(model: Path) -> None:
    loaded, folder = load_model(model, None)
    layers = read_layers(loaded, folder)
    files = [layer.weights.file.path for layer in layers if layer.weights.file]
    alias = model.parent / "alias.npz"
    alias.symlink_to(files[1])
    reports = [
        report(alias, id=1),
        report(files[0], id=2),
        report(files[0], id=3),  # another session's
        report(files[0], id=4, weight_prefix="other."),
        report(model.parent / "gone.npz", id=5),
        report("", id=6),
        report(files[0], id=7, sublayer_type="T5_FF"),
    ]
    found = of_library(layers, reports)
    assert [layer.name for layer in found] == ["moe_0", "moe_0", "moe_1"]
    assert found[2].weight_file == str(alias)


def test_nodes_on_the_same_experts_share_their_entries(model: Path) -> None:
    loaded, folder = load_model(model, None)
    first = read_layers(loaded, folder)[0]
    assert first.weights.file is not None
    twin = SimpleNamespace(name="twin", config=first.config, weights=first.weights)
    layers: list[Any] = [first, twin]
    reports = [report(first.weights.file.path, id=n) for n in (1, 2)]
    assert [layer.name for layer in of_library(layers, reports)] == ["moe_0, twin"] * 2


# --- Sessions without a GPU


def test_a_lowered_session_says_what_it_does_not_know(model: Path) -> None:
    session = moe_infer.InferenceSession(model, providers=CPU)
    session.run(None, {"x": np.ones((1, 3, D_MODEL), np.float32)})
    first, second = session.expert_stats()
    assert (first.name, second.name, first.experts) == ("moe_0", "moe_1", EXPERTS)
    assert first.where == "lowered for CPUExecutionProvider"
    assert Path(first.weight_file).name == "experts0.npz"
    unknown = ("slots", "runs", "tokens", "hits", "misses", "bytes_fetched", "uses", "resident")
    assert all(getattr(first, name) is None for name in unknown)


def test_a_session_that_counts_adds_its_runs_up(model: Path) -> None:
    session = moe_infer.InferenceSession(model, providers=CPU, expert_use=True)
    expected = np.zeros(EXPERTS, np.int64)
    for seed, tokens in enumerate((1, 2, 5)):
        x = np.random.default_rng(seed).standard_normal((1, tokens, D_MODEL)).astype(np.float32)
        session.run(None, {"x": x})
        expected += session.expert_use[0].tokens > 0
    first, _ = session.expert_stats()
    assert (first.runs, first.tokens) == (3, 8)
    assert first.uses is not None and first.uses.tolist() == expected.tolist()
    assert 0 < expected.sum() < 3 * EXPERTS  # or the test could not tell runs from experts
    first.uses[:] = 0
    assert session.expert_stats()[0].uses.tolist() == expected.tolist()


def test_threads_lose_no_run(model: Path) -> None:
    session = moe_infer.InferenceSession(model, providers=CPU, expert_use=True)
    x = np.ones((1, 2, D_MODEL), np.float32)

    def work() -> None:
        for _ in range(25):
            session.run(None, {"x": x})

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {(layer.runs, layer.tokens) for layer in session.expert_stats()} == {(100, 200)}


def test_a_model_without_layers_has_no_statistics(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xy")
    graph = onnx.helper.make_graph([node], "g", [x], [y])
    opsets = [onnx.helper.make_opsetid("", 18)]  # the oldest ONNX Runtime knows it
    plain = onnx.helper.make_model(graph, ir_version=8, opset_imports=opsets)
    onnx.save(plain, tmp_path / "plain.onnx")
    session = moe_infer.InferenceSession(tmp_path / "plain.onnx", providers=CPU)
    assert session.expert_stats() == []


# --- Shown


def stats(**changes: Any) -> ExpertStats:
    values: dict[str, Any] = {
        "name": "moe_0",
        "where": "CUDA device 0",
        "weight_file": "w.npz",
        "weight_prefix": "",
        "experts": 6,
        "runs": 8,
        "uses": np.array([8, 4, 3, 1, 0, 0]),
        "slot_of_expert": np.array([0, -1, 1, 2, -1, -1], np.int32),
    }
    return ExpertStats(**{**values, **changes})


def test_heat_map_in_a_terminal() -> None:
    assert text.heat_map([stats()]).splitlines()[:3] == [
        "moe_0",
        "  use  |█▒▒░  |",
        "  slot |■·■■··|",
    ]
    assert text.heat_map([stats()], width=3).splitlines()[1:3] == ["  use  |█▒ |", "  slot |□■·|"]
    assert text.heat_map([stats()], width=4).splitlines()[1] == "  use  |█▒ |"


def test_heat_map_shows_nothing_that_nobody_counted() -> None:
    shown = text.heat_map([stats(uses=None), stats(name="other", slot_of_expert=None)])
    assert shown.splitlines()[:4] == ["moe_0", "  slot |■·■■··|", "other", "  use  |█▒▒░  |"]
    nothing = stats(uses=None, slot_of_expert=None)
    assert text.heat_map([nothing]) == "no layer counts the use of its experts"
    assert "|      |" in text.heat_map([stats(uses=np.zeros(6, np.int64))])


def test_table_tells_unknown_from_zero() -> None:
    console = Console(width=250, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(
        text.table(
            [
                stats(hits=3, misses=1, evictions=0, bytes_fetched=2_500_000_000, slots=3,
                      prefetches_used=4, prefetches_wasted=5, stall_s=0.25, tokens=9),
                ExpertStats("cpu", "lowered", "", "", 6),
            ]
        )
    )  # fmt: skip
    first, second = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in console.export_text().splitlines()
        if "│" in line
    ]
    assert first == [
        "moe_0", "6", "3", "8", "9", "3", "1", "75.0 %", "0", "2.500 GB", "4 used, 5 wasted",
        "250.0 ms", "4",
    ]  # fmt: skip
    assert second == ["cpu", "6", *["–"] * 11]


def test_matrices_of_the_picture() -> None:
    small = stats(experts=2, uses=np.array([2, 8]), slot_of_expert=None)
    use, resident = heat_matrices([stats(), small])
    assert use[0].tolist() == [1, 0.5, 0.375, 0.125, 0, 0]
    assert use[1, :2].tolist() == [0.25, 1] and np.isnan(use[1, 2:]).all()
    assert resident[0].tolist() == [1, 0, 1, 1, 0, 0] and np.isnan(resident[1]).all()


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "heat.png"
    save_heat_map([stats(), stats(name="x" * 50)] * 40, path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    save_heat_map([stats(uses=None, slot_of_expert=None)], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="at least one layer"):
        save_heat_map([], path)


def test_picture_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ImportError, match=r"pip install 'moe-infer\[plot\]'"):
        save_heat_map([stats()], tmp_path / "heat.png")


# --- The command line


def test_run_with_statistics(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["run", str(model), "--provider=cpu", "--shape", "x=1,3,8", "--repeat", "2"]
    assert main([*run, "--stats"]) == 0
    shown = capsys.readouterr().out
    assert "count nothing; --expert-use" in " ".join(shown.split())
    assert "no layer counts the use" in shown
    assert main([*run, "--stats", "--expert-use"]) == 0
    shown = capsys.readouterr().out
    assert "use  |" in shown and "count nothing" not in shown
    assert main([*run, "--stats", "--expert-use", "--json"]) == 0
    first, _ = json.loads(capsys.readouterr().out)["expert_stats"]
    assert (first["name"], first["runs"], first["tokens"]) == ("moe_0", 2, 6)
    assert max(first["uses"]) == 2 and first["slot_of_expert"] is None


def test_run_draws(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    run = ["run", str(model), "--provider=cpu", "--shape", "x=1,3,8", "--expert-use"]
    assert main([*run, "--stats-picture", str(tmp_path / "heat.png")]) == 0
    assert "layer" not in capsys.readouterr().out.replace("MoELayer", "")
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")
