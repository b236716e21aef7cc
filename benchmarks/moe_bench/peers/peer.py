"""What the benchmark asks of everything that it compares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from moe_bench.cases import Case
from moe_bench.inputs import InputSet
from moe_bench.timing import capture
from moe_bench.weights import Experts


class UnavailableError(Exception):
    """Something cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Problem:
    """One layer in one type, with its weights in GPU memory and in a file.

    Attributes:
        case: the layer.
        dtype: "bfloat16" or "float16".
        experts: its weights.
        tokens: all numbers of tokens that will be asked for.
        stream: on which everything is timed.
    """

    case: Case
    dtype: str
    experts: Experts
    tokens: tuple[int, ...]
    stream: torch.cuda.Stream


@dataclass(frozen=True)
class Entry:
    """One thing that is timed.

    Attributes:
        run: enqueues ``runs`` runs on the current stream.
        runs: their number; a time is that of one.
        results: runs anew, and yields the number of an input set and the output for it; nothing
            of an output that is not written may look right.
        outputs: how many that are.
        before: what precedes each sample and is not timed.
        on_device: see ``timing.Contender``; for what is one launch of a CUDA graph.
        ours: a MoELayer, which has to keep the design's tolerance.
        sublayer: what it computes, where that is not quite the case's sub-layer.
        note: for the table.
    """

    run: Callable[[], Any]
    runs: int
    results: Callable[[], Iterator[tuple[int, torch.Tensor]]]
    outputs: int
    before: Callable[[], Any] | None = None
    on_device: bool = False
    ours: bool = False
    sublayer: str | None = None
    note: str = ""


def in_graph(
    layer: Callable[[InputSet], torch.Tensor], sets: list[InputSet], note: str = ""
) -> Entry:
    """A layer of PyTorch on all input sets, in one CUDA graph.

    Args:
        layer: gives the output for an input set; must not synchronise the host.
        sets: the input sets.
        note: see :class:`Entry`.
    """
    outputs: list[torch.Tensor] = []

    def run() -> None:
        outputs[:] = [layer(given) for given in sets]

    graph = capture(run)

    def results() -> Iterator[tuple[int, torch.Tensor]]:
        for output in outputs:
            output.fill_(float("nan"))
        graph.replay()
        yield from enumerate(outputs)

    return Entry(graph.replay, len(sets), results, len(sets), on_device=True, note=note)


Maker = Callable[[], Entry]


class Peer(ABC):
    """One way to run a layer.

    ``prepare``, then for each number of tokens ``open``, then for each routing ``entries``.
    Whatever one of them raises costs only what depends on it.
    """

    names: tuple[str, ...]
    """Of its entries, in the order of the table."""

    @abstractmethod
    def prepare(self, problem: Problem) -> None:
        """Loads weights, makes what serves all numbers of tokens."""

    def open(self, tokens: int) -> None:  # noqa: B027
        """Makes what serves one number of tokens."""

    @abstractmethod
    def entries(self, sets: list[InputSet], model: bool) -> dict[str, Maker]:
        """What can be timed on these inputs; each is made (captured, say) when it is called.

        Args:
            sets: the inputs.
            model: also what tells a layer's share of a whole model.
        """

    def close(self) -> None:  # noqa: B027
        """Gives back the memory of what ``prepare`` and ``open`` made."""


def rotate(sets: list[InputSet], load: Callable[[InputSet], None]) -> Callable[[], None]:
    """A function that loads the next set each time it is called."""
    place = -1

    def following() -> None:
        nonlocal place
        place = (place + 1) % len(sets)
        load(sets[place])

    return following
