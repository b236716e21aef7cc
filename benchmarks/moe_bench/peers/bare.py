"""MoELayer through the library's C entry: the bare kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from moe_bench.cases import Case
from moe_bench.inputs import InputSet
from moe_bench.peers.peer import Entry, Maker, Peer, Problem
from moe_bench.timing import capture
from moe_infer.runtime.native import Layer


class BareLayer:
    """One resident layer, with memory from PyTorch.

    Args:
        case: the layer.
        dtype: of its inputs.
        path: its weight file.
    """

    def __init__(self, case: Case, dtype: str, path: Path) -> None:
        self.layer = Layer(case.attributes(path), case.d_model, dtype, True, dtype)

    def bind(self, sets: list[InputSet]) -> BoundRuns:
        """Outputs and workspace for runs of these sets, one after the other."""
        return BoundRuns(self.layer, sets)

    def close(self) -> None:
        """Frees the layer's memory."""
        self.layer.close()


class BoundRuns:
    """Runs of one layer, each with inputs and an output of its own, in one workspace."""

    def __init__(self, layer: Layer, sets: list[InputSet]) -> None:
        self._layer, self._sets = layer, sets
        size = max(layer.workspace(len(s.hidden_states)) for s in sets)
        self._workspace = torch.empty(size, dtype=torch.uint8, device=sets[0].logits.device)
        self.outputs = [torch.empty_like(s.hidden_states) for s in sets]

    def run(self) -> None:
        """Enqueues all runs on the current stream."""
        stream = torch.cuda.current_stream().cuda_stream
        for given, output in zip(self._sets, self.outputs, strict=True):
            self._layer.run(
                given.hidden_states.data_ptr(),
                given.logits.data_ptr(),
                output.data_ptr(),
                len(given.hidden_states),
                self._workspace.data_ptr(),
                len(self._workspace),
                stream,
            )

    def poison(self) -> None:
        """Fills the outputs with NaN, so that what is not written is seen."""
        for output in self.outputs:
            output.fill_(float("nan"))


class BarePeer(Peer):
    """The layer in one CUDA graph of runs that follow one another, and launched from Python."""

    names = ("bare_graph", "bare")

    def prepare(self, problem: Problem) -> None:
        self._layer = BareLayer(problem.case, problem.dtype, problem.experts.path)

    def entries(self, sets: list[InputSet], model: bool) -> dict[str, Maker]:
        runs = self._layer.bind(sets)

        def in_a_graph() -> Entry:
            graph = capture(runs.run)

            def results() -> Iterator[tuple[int, torch.Tensor]]:
                runs.poison()
                graph.replay()
                yield from enumerate(runs.outputs)

            return Entry(graph.replay, len(sets), results, len(sets), on_device=True, ours=True)

        def launched() -> Entry:
            def results() -> Iterator[tuple[int, torch.Tensor]]:
                runs.poison()
                runs.run()
                yield from enumerate(runs.outputs)

            return Entry(runs.run, len(sets), results, len(sets), ours=True)

        return {"bare_graph": in_a_graph, "bare": launched}

    def close(self) -> None:
        self._layer.close()
