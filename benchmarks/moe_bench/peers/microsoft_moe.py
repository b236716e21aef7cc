"""``com.microsoft.MoE`` on ONNX Runtime's CUDA provider, with the same weight file."""

from __future__ import annotations

from typing import Any

import onnx
import torch

from moe_bench.cases import model_layers
from moe_bench.inputs import InputSet
from moe_bench.peers.ort_models import microsoft_moe_model
from moe_bench.peers.ort_session import (
    CUDA,
    NO_GRAPH,
    BoundSession,
    make_session,
    require_provider,
)
from moe_bench.peers.peer import Maker, Peer, Problem, UnavailableError

_SPARE = 6 << 30
"""Bytes of GPU memory that must be left besides a session's weights."""


class MicrosoftMoePeer(Peer):
    """One layer without and with a CUDA graph, and a graph of several layers with one.

    The operator has no T5_FF: there it computes the same three products with the gelu or silu gate,
    without norm and residual, which is less work, and is checked for that.
    """

    names = ("ort_moe", "ort_moe_graph", "ort_moe_layers")

    def prepare(self, problem: Problem) -> None:
        require_provider(CUDA)
        self._problem = problem
        self._models: dict[int, Any] = {}
        self._made: dict[int | str, BoundSession] = {}
        self._tokens = 0
        self._graph_ids = 0
        self._graphs = True
        self._why_no_graphs = ""
        self._single = self._first_session()

    def open(self, tokens: int) -> None:
        self._tokens = tokens
        self._made.clear()

    def entries(self, sets: list[InputSet], model: bool) -> dict[str, Maker]:
        kinds = {"sublayer": self._sublayer, "note": self._note}
        layers = model_layers(self._tokens)
        makers: dict[str, Maker] = {
            "ort_moe": lambda: self._plain().single(sets, **kinds),
            "ort_moe_graph": lambda: self._captured(1).single(sets, **kinds),
        }
        if model:
            makers["ort_moe_layers"] = lambda: self._captured(layers).model(sets, **kinds)
        return makers

    def close(self) -> None:
        self._made = {}
        self._models = {}
        self._single = None

    def _plain(self) -> BoundSession:
        if "plain" not in self._made:
            graph_id = NO_GRAPH if self._graphs else None
            bound = BoundSession(self._single, self._problem, self._tokens, graph_id=graph_id)
            bound.warm_up()
            self._made["plain"] = bound
        return self._made["plain"]

    def _captured(self, layers: int) -> BoundSession:
        """Buffers and a graph of their own, under a number of its own."""
        if not self._graphs:
            raise UnavailableError(f"no CUDA graph: {self._why_no_graphs}")
        if layers not in self._made:
            session = self._single if layers == 1 else self._model(layers)
            problem, tokens = self._problem, self._tokens
            # Whatever is tuned or allocated at first must not happen in the capture.
            BoundSession(session, problem, tokens, layers, graph_id=NO_GRAPH).warm_up(2)
            self._graph_ids += 1
            bound = BoundSession(session, problem, tokens, layers, graph_id=str(self._graph_ids))
            bound.warm_up()
            self._made[layers] = bound
        return self._made[layers]

    def _first_session(self) -> Any:
        """With CUDA graphs if it takes them; with the gate that is nearest to the case's."""
        t5 = self._problem.case.sublayer == "T5_FF"
        errors = []
        for activation in ("geglu", "swiglu") if t5 else ("swiglu",):
            self._activation = activation
            self._sublayer = {"geglu": "Gated_GELU", "swiglu": "Gated_SiLU"}[activation]
            self._note = f"{activation} without norm and residual" if t5 else ""
            for graphs in (True, False):
                self._graphs = graphs
                try:
                    session = self._session(1)
                    few = min(self._problem.tokens)
                    tried = BoundSession(
                        session, self._problem, few, graph_id=NO_GRAPH if graphs else None
                    )
                    tried.warm_up(1)
                    return session
                except Exception as error:  # ONNX Runtime's own types differ by release
                    errors.append(str(error))
                    self._why_no_graphs = str(error)
                    if "memory" in str(error).lower():
                        raise
        raise UnavailableError(" | ".join(dict.fromkeys(errors)))

    def _model(self, layers: int) -> Any:
        if layers not in self._models:
            needed = self._problem.case.experts * self._problem.case.expert_bytes + _SPARE
            self._models.clear()
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info()
            if free < needed:
                raise UnavailableError(
                    f"a second session would need {needed / 2**30:.0f} GiB of GPU memory,"
                    f" {free / 2**30:.0f} GiB are free"
                )
            self._models[layers] = self._session(layers)
        return self._models[layers]

    def _session(self, layers: int) -> Any:
        problem = self._problem
        path = problem.experts.path
        model = microsoft_moe_model(
            problem.case, problem.dtype, path, layers, None, self._activation
        )
        file = path.with_name(f"{path.stem}-{layers}.onnx")
        onnx.save(model, file)
        options = {
            "arena_extend_strategy": "kSameAsRequested",
            "enable_cuda_graph": "1" if self._graphs else "0",
        }
        return make_session(str(file), CUDA, options, problem.stream)
