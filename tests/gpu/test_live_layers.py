"""Counters of live layers: through the C entry, and inside of sessions."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("moe_infer.runtime.native")

import onnxruntime as ort  # noqa: E402
from gpu_layers import make_attributes, make_input, make_layer, run, same_bits  # noqa: E402
from gpu_models import with_rest  # noqa: E402

import moe_infer  # noqa: E402
from layer_models import assert_close, layer_model  # noqa: E402
from moe_infer.runtime import native, plugin  # noqa: E402
from moe_infer.runtime.stats import ExpertStats  # noqa: E402

pytestmark = pytest.mark.needs_library
EXPERTS, D_MODEL, HIDDEN = 6, 32, 48
TRT = "TensorrtExecutionProvider"
EXPERT_BYTES = 4 * (D_MODEL + 3 * D_MODEL * HIDDEN)


_before: set[int] = set()


@pytest.fixture(autouse=True)
def remember() -> None:
    """Layers of other tests may still live, held by a traceback for instance."""
    gc.collect()
    _before.clear()
    _before.update(layer.id for layer in native.live_layers())


def ours() -> list[native.LayerReport]:
    """The layers that this test made."""
    return [layer for layer in native.live_layers() if layer.id not in _before]


def shown() -> list[ExpertStats]:
    return [layer for layer in moe_infer.expert_stats() if layer.id not in _before]


def one_hot(*experts: int) -> np.ndarray:
    logits = np.zeros((len(experts), EXPERTS), np.float32)
    logits[np.arange(len(experts)), experts] = 1
    return logits


@pytest.mark.sanitize
def test_a_layer_that_streams_counts_uses_and_residency(tmp_path: Path) -> None:
    attributes = make_attributes(
        tmp_path, "T5_FF", "default", EXPERTS, D_MODEL, HIDDEN, centroids=False, max_concurrency=2
    )
    uses = np.zeros(EXPERTS, np.int64)
    with make_layer(attributes, D_MODEL, "float32", "float32") as layer:
        before = layer.report()
        assert before.uses is not None and not before.uses.any()
        assert before.slot_of_expert is not None and (before.slot_of_expert == -1).all()
        for experts in ((0, 0, 0), (1,), (0, 1), (2,), (5, 5), (0, 3, 4)):
            run(layer, make_input(len(experts), D_MODEL, "float32"), one_hot(*experts))
            uses[list(set(experts))] += 1
        found = layer.report()
        assert found.uses is not None and found.uses.tolist() == uses.tolist()
        assert found.slot_of_expert is not None
        held = found.slot_of_expert[found.slot_of_expert >= 0]
        assert sorted(held) == [0, 1]  # each slot once
        assert found.slot_of_expert[4] >= 0  # the last that ran
        stats = found.stats
        assert (stats.runs, stats.tokens) == (6, 12)
        assert stats.hits + stats.misses == uses.sum()
        assert stats.misses - stats.evictions == 2
        assert stats.bytes_fetched == stats.misses * EXPERT_BYTES
        assert (found.streams, found.slots, found.expert_count) == (True, 2, EXPERTS)
        assert found.slot_bytes >= EXPERT_BYTES
        assert Path(found.weight_file).samefile(attributes["expert_weight_file"])
        (listed,) = ours()
        assert listed.id == found.id and listed.stats == stats


def test_what_is_in_a_slot_is_a_hit_and_what_is_not_is_a_miss(tmp_path: Path) -> None:
    """Residency as it is told against what the next run does."""
    attributes = make_attributes(
        tmp_path, "T5_FF", "default", EXPERTS, D_MODEL, HIDDEN, centroids=False, max_concurrency=3
    )
    rng = np.random.default_rng(5)
    with make_layer(attributes, D_MODEL, "float32", "float32") as layer:
        for _ in range(40):
            expert = int(rng.integers(EXPERTS))
            before = layer.report()
            assert before.slot_of_expert is not None
            run(layer, make_input(1, D_MODEL, "float32"), one_hot(expert))
            hits = layer.stats().hits - before.stats.hits
            assert hits == int(before.slot_of_expert[expert] >= 0)


def test_a_layer_whose_experts_all_stay_counts_no_use(tmp_path: Path) -> None:
    attributes = make_attributes(
        tmp_path, "T5_FF", "default", EXPERTS, D_MODEL, HIDDEN, centroids=False
    )
    with make_layer(attributes, D_MODEL, "float32", "float32") as layer:
        run(layer, make_input(2, D_MODEL, "float32"), one_hot(0, 3))
        found = layer.report()
        assert found.uses is None and not found.streams
        assert found.slot_of_expert is not None
        assert found.slot_of_expert.tolist() == list(range(EXPERTS))
        assert (found.stats.runs, found.stats.tokens, found.stats.misses) == (1, 2, 0)
        assert found.stats.bytes_fetched == EXPERTS * EXPERT_BYTES  # when it was loaded
        (told,) = shown()
        assert told.hits is None and told.uses is None


def test_layers_are_listed_while_they_live(tmp_path: Path) -> None:
    attributes = make_attributes(tmp_path, "T5_FF", "default", EXPERTS, D_MODEL, HIDDEN)
    first = make_layer(attributes, D_MODEL, "float32")
    second = make_layer({**attributes, "max_concurrency": 1}, D_MODEL, "float32")
    assert [found.slots for found in ours()] == [EXPERTS, 1]
    first_id = ours()[0].id
    first.close()
    with pytest.raises(ValueError):
        make_layer({**attributes, "top_k": 99}, D_MODEL, "float32")
    assert [found.slots for found in ours()] == [1]
    third = make_layer(attributes, D_MODEL, "float32")
    assert ours()[1].id > first_id
    second.close()
    third.close()
    assert ours() == []


def test_asking_disturbs_no_run(tmp_path: Path) -> None:
    """Runs, layers that come and go, and two threads that ask all the time."""
    attributes = make_attributes(
        tmp_path, "T5_FF", "default", EXPERTS, D_MODEL, HIDDEN, max_concurrency=2
    )
    x = make_input(40, D_MODEL, "float32")
    failures: list[BaseException] = []
    done = threading.Event()

    def ask(layer: native.Layer) -> None:
        last = layer.report()
        try:
            while not done.is_set():
                native.live_layers()
                now = layer.report()
                assert now.uses is not None and last.uses is not None
                assert (now.uses >= last.uses).all()
                assert now.stats.misses >= last.stats.misses
                last = now
        except BaseException as error:
            failures.append(error)

    with make_layer(attributes, D_MODEL, "float32") as layer:
        expected = run(layer, x)
        threads = [threading.Thread(target=ask, args=(layer,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for turn in range(200):
                assert same_bits(run(layer, x), expected)
                if turn % 20 == 0:
                    make_layer(attributes, D_MODEL, "float32").close()
        finally:
            done.set()
            for thread in threads:
                thread.join()
        assert layer.stats().runs == 201
    assert not failures, failures[0]


@pytest.mark.engine
@pytest.mark.parametrize("slots", [2, EXPERTS])
def test_layers_in_a_session(tmp_path: Path, slots: int) -> None:
    if TRT not in ort.get_available_providers() or not plugin.status().usable:
        pytest.skip(f"no TensorRT provider, or {plugin.status().reason}")
    attributes = [
        make_attributes(
            tmp_path, kind, "softmax_topk", EXPERTS, D_MODEL, HIDDEN, 2, max_concurrency=slots
        )
        for kind in ("T5_FF", "Gated_SiLU")
    ]
    path = tmp_path / "model.onnx"
    onnx.save(layer_model(attributes, D_MODEL), path)
    session = moe_infer.InferenceSession(
        path, providers=with_rest(TRT), expert_use=slots == EXPERTS
    )
    x = make_input(10, D_MODEL, "float32").reshape(1, 10, D_MODEL)
    for _ in range(3):
        (y,) = session.run(None, {"x": x})
    on_cpu = moe_infer.InferenceSession(path, providers=["CPUExecutionProvider"], expert_use=True)
    (expected,) = on_cpu.run(None, {"x": x})
    assert_close(y, expected.astype(np.float64), "float32")
    found = session.expert_stats()
    assert [layer.name for layer in found] == ["moe_0", "moe_1"]
    for layer, use in zip(found, on_cpu.expert_use, strict=True):
        assert (layer.runs, layer.tokens, layer.slots) == (3, 30, slots)
        # A layer that streams counts by itself; of one that does not the session does.
        assert layer.uses is not None and layer.uses.tolist() == (3 * (use.tokens > 0)).tolist()
        assert layer.resident is not None and layer.resident.sum() == slots
        if slots < EXPERTS:
            assert layer.hits is not None and layer.misses is not None
            assert layer.hits + layer.misses == layer.uses.sum() and layer.misses >= use.used
    assert len(shown()) == 2  # for who has a plain session
    del session
    gc.collect()
    assert shown() == []
