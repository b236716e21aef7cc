"""Bare layers one after the other on one stream, and what they fetched meanwhile."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from moe_bench.cases import Case
from moe_bench.check import WrongResultError
from moe_bench.peers.peer import UnavailableError
from moe_bench.timing import capture
from moe_infer.runtime.native import Layer, NextLogits

FETCH_VARIABLE = "MOE_INFER_FETCH"
PINNED_VARIABLE = "MOE_INFER_PINNED_BYTES"


@dataclass(frozen=True)
class Counters:
    """Of all layers of a chain; see LayerStats."""

    hits: int
    misses: int
    bytes_fetched: int
    prefetches_used: int
    prefetches_wasted: int
    prefetch_bytes_used: int
    prefetch_bytes_wasted: int

    def __sub__(self, other: Counters) -> Counters:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Counters(*(mine - its for mine, its in pairs))

    @property
    def bytes_needed(self) -> int:
        """Fetched, without what came ahead and was not needed."""
        return self.bytes_fetched - self.prefetch_bytes_wasted

    @property
    def hit_rate(self) -> float | None:
        """None where nothing is counted: all experts stay."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else None


class Chain:
    """Layers of one shape.

    Args:
        case: their shape.
        dtype: of their inputs.
        files: weight files, which layers take in turn.
        layers: how many.
        slots: of each; as many as experts: all stay.
        mode: "host" or "device".
    """

    def __init__(
        self,
        case: Case,
        dtype: str,
        files: Sequence[Path],
        layers: int,
        slots: int,
        mode: str = "host",
    ) -> None:
        self.case, self.dtype, self.mode, self.slots = case, dtype, mode, slots
        self.layers: list[Layer] = []
        try:
            with environment(FETCH_VARIABLE, mode):
                for i in range(layers):
                    attributes = case.attributes(files[i % len(files)]) | {"max_concurrency": slots}
                    self.layers.append(Layer(attributes, case.d_model, dtype, True, dtype))
        except Exception:
            self.close()
            raise

    def counters(self) -> Counters:
        """So far; waits for what is enqueued."""
        synchronize()
        found = [layer.stats() for layer in self.layers]
        return Counters(*(sum(getattr(s, f.name) for s in found) for f in fields(Counters)))

    def bind(self, hidden_states: torch.Tensor, guesses: bool = False, pause: int = 0) -> Bound:
        """Buffers for runs of all layers on the same hidden states.

        Args:
            hidden_states: (tokens, d_model).
            guesses: each layer is given a guess of the next one's router logits.
            pause: cycles for which the GPU does nothing after each layer.
        """
        return Bound(self, hidden_states, guesses, pause)

    def close(self) -> None:
        """Frees the layers; idempotent."""
        for layer in self.layers:
            layer.close()

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class Bound:
    """A chain with its buffers; every layer has an output of its own.

    Attributes:
        logits: (layers, tokens, experts), what the next run routes by.
        guesses: the same, what each layer's logits are guessed to be, of which the layer before it
            is told; None: nothing is.
        outputs: (layers, tokens, d_model).
        ran: runs so far.
    """

    def __init__(
        self, chain: Chain, hidden_states: torch.Tensor, guesses: bool, pause: int
    ) -> None:
        self._chain, self._x, self._pause = chain, hidden_states, pause
        case, tokens, device = chain.case, len(hidden_states), hidden_states.device
        count = len(chain.layers)
        self.logits = torch.zeros(
            (count, tokens, case.experts), dtype=hidden_states.dtype, device=device
        )
        self.guesses = torch.zeros_like(self.logits) if guesses else None
        self.outputs = hidden_states.new_empty((count, tokens, case.d_model))
        size = max(layer.workspace(tokens) for layer in chain.layers)
        self._workspace = torch.empty(size, dtype=torch.uint8, device=device)
        self._addresses = [
            (layer, self.logits[i].data_ptr(), self.outputs[i].data_ptr(), self._guess_after(i))
            for i, layer in enumerate(chain.layers)
        ]
        self._run: Callable[[], Any] = self.launch
        self.ran = 0

    def launch(self) -> None:
        """Enqueues all layers on the current stream."""
        stream, x = stream_address(), self._x.data_ptr()
        workspace, size = self._workspace.data_ptr(), len(self._workspace)
        tokens = len(self._x)
        for layer, logits, output, guess in self._addresses:
            layer.run(x, logits, output, tokens, workspace, size, stream, guess)
            if self._pause:
                torch.cuda._sleep(self._pause)

    def _guess_after(self, layer: int) -> NextLogits | None:
        """What a layer is told of the next one's logits."""
        if self.guesses is None or layer + 1 == len(self.guesses):
            return None
        case = self._chain.case
        return NextLogits(self.guesses[layer + 1].data_ptr(), case.experts, self._chain.dtype)

    def into_a_graph(self) -> None:
        """From now on a run is one launch of a CUDA graph.

        Raises:
            UnavailableError: the layers cannot be captured.
        """
        try:
            self._run = capture(self.launch).replay
            self.ran += 1  # outside of the graph
        except (ValueError, RuntimeError) as error:
            raise UnavailableError(f"no CUDA graph: {error}") from error

    def poison(self) -> None:
        """Fills the outputs with NaN, so that what is not written is seen."""
        self.outputs.fill_(float("nan"))

    def step(
        self,
        logits: torch.Tensor,
        hidden_states: torch.Tensor | None = None,
        guesses: torch.Tensor | None = None,
    ) -> None:
        """One run, routed by these logits; hidden states and guesses stay if none are given."""
        self.logits.copy_(logits)
        if self.guesses is not None and guesses is not None:
            self.guesses.copy_(guesses)
        if hidden_states is not None:
            self._x.copy_(hidden_states)
        self._run()
        self.ran += 1

    def must_equal(self, other: Bound) -> None:
        """Compares all outputs bit by bit.

        Raises:
            WrongResultError: they differ, or are not finite.
        """
        if not bool(self.outputs.isfinite().all()):
            raise WrongResultError("an output has values that are NaN or infinite")
        for i, (mine, theirs) in enumerate(zip(self.outputs, other.outputs, strict=True)):
            if not torch.equal(mine, theirs):
                count = int((mine != theirs).sum())
                raise WrongResultError(
                    f"layer {i}: {count} of {mine.numel()} values are not those of the layer whose"
                    " experts all stay"
                )


def open_bound(
    chain: Chain,
    hidden_states: torch.Tensor,
    logits: torch.Tensor,
    guesses: bool = False,
    pause: int = 0,
) -> Bound:
    """Buffers for a chain, in a CUDA graph where no host has to drive the fetches.

    Args:
        chain: the layers.
        hidden_states: (tokens, d_model).
        logits: (layers, tokens, experts) of the run outside of the graph that precedes capturing.
        guesses: as for ``Chain.bind``.
        pause: the same.
    """
    bound = chain.bind(hidden_states, guesses, pause)
    if chain.mode == "device" or chain.slots >= chain.case.experts:
        bound.logits.copy_(logits)
        bound.into_a_graph()
    return bound


def stream_address() -> int:
    """The current stream."""
    return int(torch.cuda.current_stream().cuda_stream)


def synchronize() -> None:
    """Waits for the device."""
    torch.cuda.synchronize()


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Sets a variable of the environment for a while; the library reads it when layers are made."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
