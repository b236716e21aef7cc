"""MoELayer in stock ONNX Runtime, through its TensorRT provider."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

from moe_bench.cases import model_layers
from moe_bench.inputs import InputSet
from moe_bench.peers.ort_models import moe_layer_model, names
from moe_bench.peers.ort_session import (
    TENSORRT,
    BoundSession,
    make_session,
    require_provider,
)
from moe_bench.peers.peer import Maker, Peer, Problem, UnavailableError
from moe_infer.runtime import plugin

_WORKSPACE = 16 << 30


@dataclass(frozen=True)
class Way:
    """How the graph is given to TensorRT.

    Attributes:
        casts: float32 outside, Casts around the layers.
        options: of the provider.
        note: for the table.
    """

    casts: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""


class TensorRtPeer(Peer):
    """One layer without and with a CUDA graph, and a graph of several layers with one.

    The experts are those of the bare layer: the library keeps them once in a process.
    """

    names = ("trt", "trt_graph", "trt_layers")

    def prepare(self, problem: Problem) -> None:
        status = plugin.status()
        if not status.usable:
            raise UnavailableError(status.reason)
        require_provider(TENSORRT)
        self._problem = problem
        self._way = Way()
        self._single = self._dynamic_session()
        self._tokens = 0
        self._made: dict[str, BoundSession] = {}

    def open(self, tokens: int) -> None:
        self._tokens = tokens
        self._made.clear()

    def entries(self, sets: list[InputSet], model: bool) -> dict[str, Maker]:
        kinds = {"ours": True, "note": self._way.note}
        layers = model_layers(self._tokens)
        makers: dict[str, Maker] = {
            "trt": lambda: self._plain().single(sets, **kinds),
            "trt_graph": lambda: self._captured(1).single(sets, **kinds),
        }
        if model:
            makers["trt_layers"] = lambda: self._captured(layers).model(sets, **kinds)
        return makers

    def close(self) -> None:
        self._made = {}
        self._single = None

    def _dynamic_session(self) -> Any:
        """A session for every number of tokens; finds out how this release takes the type."""
        problem = self._problem
        precision = {f"trt_{'bf16' if problem.dtype == 'bfloat16' else 'fp16'}_enable": "True"}
        ways = (
            Way(options=precision),
            Way(),
            Way(casts=True, options=precision, note=f"float32 outside, Cast to {problem.dtype}"),
        )
        case = problem.case

        def shapes(tokens: int) -> str:
            x, logits, _ = names(0)
            return f"{x}:{tokens}x{case.d_model},{logits}:{tokens}x{case.experts}"

        most = max(problem.tokens)
        profile = {
            "trt_profile_min_shapes": shapes(min(problem.tokens)),
            "trt_profile_opt_shapes": shapes(most),
            "trt_profile_max_shapes": shapes(most),
        }
        errors = []
        for way in ways:
            self._way = way
            try:
                session = self._session(1, None, profile)
                BoundSession(session, problem, most, 1, way.casts).warm_up(1)
                return session
            except Exception as error:  # ONNX Runtime's own types differ by release
                errors.append(f"{error}{_plugin_says()}")
        raise UnavailableError(" | ".join(errors))

    def _plain(self) -> BoundSession:
        if "plain" not in self._made:
            bound = BoundSession(self._single, self._problem, self._tokens, 1, self._way.casts)
            bound.warm_up()
            self._made["plain"] = bound
        return self._made["plain"]

    def _captured(self, layers: int) -> BoundSession:
        """A session that replays a CUDA graph, which TensorRT's provider makes once a session."""
        name = f"{layers} layers"
        if name not in self._made:
            session = self._session(layers, self._tokens, {"trt_cuda_graph_enable": "True"})
            bound = BoundSession(session, self._problem, self._tokens, layers, self._way.casts)
            bound.warm_up()
            self._made[name] = bound
        return self._made[name]

    def _session(self, layers: int, tokens: int | None, options: dict[str, Any]) -> Any:
        problem, way = self._problem, self._way
        model = moe_layer_model(
            problem.case, problem.dtype, problem.experts.path, layers, tokens, way.casts
        )
        given = {
            # Layers that do not depend on each other must not run side by side.
            "trt_auxiliary_streams": "0",
            # The default of some releases is less than thousands of tokens need.
            "trt_max_workspace_size": str(_WORKSPACE),
            **way.options,
            **options,
        }
        return make_session(model.SerializeToString(), TENSORRT, given, problem.stream)


def _plugin_says() -> str:
    """What is otherwise only in TensorRT's log."""
    with contextlib.suppress(Exception):
        said = plugin.load().moe_infer_last_error().decode(errors="replace")
        return f" (the plugin says: {said})" if said else ""
    return ""
