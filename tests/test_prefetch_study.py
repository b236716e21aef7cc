"""benchmarks/prefetch_study.py: what it calls chosen and guessed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import moe_infer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import prefetch_study  # noqa: E402
from moe_bench.guesses import best, recall  # noqa: E402


def test_best_and_recall() -> None:
    scores = np.array([[0.0, 3, 1, 3], [5, 1, 2, 0]])
    assert best(scores, 2).tolist() == [[1, 3], [0, 2]]
    chosen = np.array([[1, 3], [0, 2]])
    assert recall(np.array([[3, 0], [2, 0]]), chosen) == 0.75
    assert recall(np.array([[2], [1]]), chosen) == 0


def test_the_study_sees_what_the_model_chooses(tmp_path: Path) -> None:
    exported = ROOT / "examples/tiny_moe/gated_top2.onnx"
    tokens = np.arange(24).reshape(1, 24)
    (layers,) = prefetch_study.run(exported, [tokens])
    moe_infer.rewrite(exported, tmp_path)
    session = moe_infer.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"], expert_use=True
    )
    for layer, chosen in zip(layers, session.expert_choices({"tokens": tokens}), strict=True):
        np.testing.assert_array_equal(np.sort(layer.chosen), np.sort(chosen))
        # Its own router, on its own hidden states, is no guess.
        sure = best(layer.hidden @ layer.router, layer.top_k)
        assert recall(sure, layer.chosen) == 1
    rows = prefetch_study.study([layers])
    assert [row["to"] for row in rows] == [layer.name for layer in layers[1:]]
    assert all(row["router + 0"] <= row["router + 1"] <= row["router + 2"] <= 1 for row in rows)
    assert "| tiny | 0 to 1 | 2 |" in prefetch_study.table([{"model": "tiny", **rows[0]}])
