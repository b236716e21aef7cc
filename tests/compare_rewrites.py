"""A rewritten export against PyTorch and against the graph that was exported."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import moe_infer
from evaluate_graph import cannot_run, run_runtime
from moe_infer.graph.report import RewriteReport

TOLERANCE = 1e-4


def run_lowered(path: Path, inputs: dict[str, Any]) -> list[Any]:
    """Outputs of a rewritten model through the lowering, on the CPU provider."""
    session = moe_infer.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs: list[Any] = session.run(None, inputs)
    return outputs


def check_same(original: Path, rewritten: Path, feeds: Iterable[dict[str, Any]]) -> None:
    """Every output of both graphs for each of the inputs that the original can be given."""
    for inputs in feeds:
        if cannot_run(inputs):
            continue
        before, after = run_runtime(original, inputs), run_lowered(rewritten, inputs)
        assert len(before) == len(after) > 0
        for a, b in zip(before, after, strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(b, a, rtol=0, atol=TOLERANCE)


def edited(path: Path, folder: Path, *edits: Any) -> Path:
    """A copy of a model, with its weights inside, changed by functions of its graph."""
    model = onnx.load(path)
    for edit in edits:
        edit(model.graph)
    _prune(model.graph)
    copy = folder / "edited" / "model.onnx"
    copy.parent.mkdir()
    onnx.save(model, copy)
    return copy


def _prune(graph: onnx.GraphProto) -> None:
    """Removes nodes that nothing reads, as an exporter would."""
    read = {i for n in graph.node for i in n.input} | {o.name for o in graph.output}
    dead = [n for n in graph.node if not set(n.output) & read]
    for node in dead:
        graph.node.remove(node)
    if dead:
        _prune(graph)


def refused(path: Path, folder: Path) -> RewriteReport:
    """The report of a rewrite that must find nothing; checks that nothing was written."""
    report = moe_infer.rewrite(path, folder / "out")
    assert not report, str(report)
    assert not (folder / "out").exists()
    return report


def assert_left_alone(path: Path, folder: Path, reason: str) -> RewriteReport:
    """Nothing is found in a graph, nothing written, and the reason is among those of the report."""
    report = refused(path, folder)
    assert any(reason in miss.reason for miss in report.near_misses), str(report)
    return report


def nodes(graph: onnx.GraphProto, op_type: str) -> list[onnx.NodeProto]:
    """Nodes of a type, in order."""
    return [n for n in graph.node if n.op_type == op_type]


def producer(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    """The node that makes a value."""
    (found,) = [n for n in graph.node if name in n.output]
    return found
