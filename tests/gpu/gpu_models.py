"""Whole models through a session: what ran where, and how close the logits are to PyTorch's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from tensorrt_needed import TRT

import moe_infer
from moe_infer.op import OP_TYPE

REST = ("CUDAExecutionProvider", "CPUExecutionProvider")


@dataclass(frozen=True)
class Ran:
    """One run of a session.

    Attributes:
        logits: the first output.
        lowered: whether the MoELayer nodes were replaced by standard operators.
        layers: number of MoELayer nodes in the model.
        nodes: (provider, operator, name) of everything that ran; a piece of the graph that
            TensorRT took is one node.
    """

    logits: np.ndarray[Any, Any]
    lowered: bool
    layers: int
    nodes: list[tuple[str, str, str]]

    def check_on_tensorrt(self) -> None:
        """TensorRT has every MoELayer node: nothing lowered, and none ran as a node of its own."""
        assert not self.lowered
        assert self.layers
        assert any(provider == TRT for provider, _, _ in self.nodes), self.nodes
        assert not [node for node in self.nodes if node[1] == OP_TYPE], self.nodes

    def parts(self) -> dict[str, int]:
        """Number of nodes by provider; on TensorRT the engines."""
        counts: dict[str, int] = {}
        for provider in dict.fromkeys(provider for provider, _, _ in self.nodes):
            counts[provider] = len({name for p, _, name in self.nodes if p == provider})
        return counts


def with_rest(first: Any) -> list[Any]:
    """A provider, and those that this ONNX Runtime has for what the first cannot run."""
    available = ort.get_available_providers()
    return [first, *(name for name in REST if name in available)]


def run(
    model: Path,
    feeds: dict[str, Any],
    folder: Path,
    providers: list[Any] | None = None,
    **options: Any,
) -> Ran:
    """Runs a model once, by default on TensorRT and on what this ONNX Runtime has for the rest.

    Args:
        model: with MoELayer nodes.
        feeds: its inputs.
        folder: for the profile.
        providers: as for :class:`moe_infer.InferenceSession`.
        options: more of its arguments.
    """
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.enable_profiling = True
    settings.profile_file_prefix = str(folder / "profile")
    chosen = with_rest(TRT) if providers is None else providers
    session = moe_infer.InferenceSession(model, settings, providers=chosen, **options)
    logits = session.run(None, feeds)[0]
    events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [
        (event["args"]["provider"], event["args"].get("op_name", ""), event["name"])
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    ]
    return Ran(np.asarray(logits), session.lowered, len(session.moe_layers), nodes)
