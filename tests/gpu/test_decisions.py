"""A layer that streams decides as the simulator says, and remembers what it counted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("moe_infer.runtime.native")

from gpu_layers import make_attributes, make_input, make_layer, run  # noqa: E402

from moe_infer.simulate import replay  # noqa: E402

pytestmark = pytest.mark.needs_library
EXPERTS, D_MODEL = 16, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(params=["host", "device"])
def fetch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MOE_INFER_FETCH", request.param)
    return str(request.param)


def make(folder: Path, slots: int) -> Any:
    attributes = make_attributes(
        folder,
        "Gated_SiLU",
        "default",
        EXPERTS,
        D_MODEL,
        96,
        dtype="bfloat16",
        centroids=False,
        max_concurrency=slots,
    )
    return make_layer(attributes, D_MODEL, "bfloat16", "float32")


def call(layer: Any, experts: Sequence[int]) -> tuple[int, int, int]:
    """One run with a token for each expert; hits, misses and evictions."""
    logits = np.zeros((len(experts), EXPERTS), np.float32)
    logits[np.arange(len(experts)), experts] = 1
    before = layer.stats()
    run(layer, make_input(len(experts), D_MODEL, "bfloat16"), logits)
    after = layer.stats()
    return (
        after.hits - before.hits,
        after.misses - before.misses,
        after.evictions - before.evictions,
    )


@pytest.mark.parametrize("policy", ["lru", "lfu:5", "halved:1", "halved:7", None])
@pytest.mark.parametrize("slots", [5, 11])
def test_the_replay_says_what_a_layer_does(
    folder: Path, fetch: str, slots: int, policy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Call by call; where the host fetches, some need more experts than there are slots."""
    if policy is not None:
        monkeypatch.setenv("MOE_INFER_POLICY", policy)
    rng = np.random.default_rng(slots)
    likely = 1 / (1 + np.arange(EXPERTS))
    most = EXPERTS if fetch == "host" else slots
    calls = []
    for i in range(120):
        size = most if i % 17 == 16 else rng.integers(1, min(slots, 5) + 1)
        chosen = rng.choice(EXPERTS, size, replace=False, p=likely / likely.sum())
        calls.append(sorted(chosen.tolist()))
    offsets = np.cumsum([0, *(len(c) for c in calls)])
    expected = replay(offsets, np.concatenate(calls).astype(np.int32), EXPERTS, slots, policy)
    with make(folder, slots) as layer:
        for i, needed in enumerate(calls):
            entries = expected.plan[offsets[i] : offsets[i + 1]]
            right = (
                int(expected.hits[i]),
                int(expected.misses[i]),
                int((entries["evicted"] >= 0).sum()),
            )
            assert call(layer, needed) == right, f"call {i}: {needed}"


def test_counts_survive_a_restart(
    folder: Path, tmp_path: Path, fetch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "use.txt"

    def last_of_four() -> int:
        """2, 0 and 3 come one after another into two slots: is 0 still there?"""
        with make(folder, 2) as layer:
            for expert in (2, 0, 3):
                assert call(layer, [expert])[1] == 1
            return call(layer, [0])[1]

    assert last_of_four() == 1  # all were needed once, and 0 came last
    monkeypatch.setenv("MOE_INFER_STATISTICS_FILE", str(path))
    with make(folder, 2) as layer:
        for experts in ([0], [0, 1], [0], [0, 1], [0]):
            call(layer, experts)
    line = path.read_text().splitlines()[1].split()
    assert line[3:7] == [str(EXPERTS), "5", "5:5", "2:4"]
    assert line[7:] == ["0:0"] * (EXPERTS - 2)
    assert last_of_four() == 0  # 0 was needed most, so 2 left for 3
    assert path.read_text().splitlines()[1].split()[3:6] == [str(EXPERTS), "9", "7:9"]


def test_a_damaged_file_changes_nothing(
    folder: Path, tmp_path: Path, fetch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "use.txt"
    path.write_text("moe-infer expert use 1\nnonsense\n")
    monkeypatch.setenv("MOE_INFER_STATISTICS_FILE", str(path))
    with make(folder, 2) as layer:
        assert call(layer, [4, 5]) == (0, 2, 0)
    assert len(path.read_text().splitlines()) == 2
    assert path.read_text().splitlines()[1].split()[3:5] == [str(EXPERTS), "1"]
