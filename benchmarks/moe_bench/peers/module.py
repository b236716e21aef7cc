"""Another implementation, from a Python file that the user names."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from moe_bench.inputs import InputSet
from moe_bench.peers.peer import Maker, Peer, Problem, UnavailableError, in_graph


class ModulePeer(Peer):
    """A file with ``make(case) -> callable``, in a CUDA graph.

    ``case`` has the fields of ``cases.Case``, and ``dtype``, ``gate_up`` (experts, 2 * hidden,
    d_model; gate rows first), ``down`` (experts, d_model, hidden), ``layer_norm``. The callable
    takes hidden_states (tokens, d_model) and router logits (tokens, experts), both of the case's
    type, and returns (tokens, d_model). It must not synchronise the host.

    Args:
        path: the file.
    """

    names = ("module",)

    def __init__(self, path: Path) -> None:
        self._path = path

    def prepare(self, problem: Problem) -> None:
        spec = importlib.util.spec_from_file_location("peer_module", self._path)
        if spec is None or spec.loader is None:
            raise UnavailableError(f"{self._path} is no Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        fields = vars(problem.case) | vars(problem.experts) | {"dtype": problem.dtype}
        self._layer: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = module.make(
            SimpleNamespace(**fields)
        )

    def entries(self, sets: list[InputSet], model: bool) -> dict[str, Maker]:
        def layer(given: InputSet) -> torch.Tensor:
            return self._layer(given.hidden_states, given.logits)

        return {"module": lambda: in_graph(layer, sets, self._path.name)}
