"""One budget of GPU memory for all experts of a model, split into slots for its layers.

Slots are still each layer's own: a slot of one layer never serves another one. So a budget is split
once, before anything runs, and the split does not follow what the layers turn out to need. The
budget is for slots alone. Workspace, and what a layer keeps beside its slots, comes on top of it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from moe_infer.byte_size import ByteSize, format_bytes, parse_bytes
from moe_infer.op import LayerConfig
from moe_infer.slot_layout import slot_bytes

BUDGET_VARIABLE = "MOE_INFER_GPU_BUDGET"

_MOST_SLOTS = 2**31 - 1
"""TensorRT passes attributes on in 32 bits."""


class HasExperts(Protocol):
    """What the split looks at; :class:`moe_infer.inspect.LayerInfo` has it, too."""

    @property
    def name(self) -> str:
        """The node's."""

    @property
    def experts(self) -> int:
        """Number of experts."""

    @property
    def top_k(self) -> int:
        """Experts a token."""

    @property
    def slot_bytes(self) -> int:
        """Bytes of one expert on the GPU; 0: the experts have no weights."""


@dataclass(frozen=True)
class LayerSlots:
    """One layer's part of a budget.

    Attributes:
        name: the node's.
        experts: number of experts.
        top_k: experts a token.
        slot_bytes: bytes of one expert on the GPU; 0: the experts have no weights.
        slots: experts in GPU memory at once; 0 for experts without weights, which need none.
    """

    name: str
    experts: int
    top_k: int
    slot_bytes: int
    slots: int = 0

    @classmethod
    def needs(cls, name: str, config: LayerConfig, d_model: int, dtype: str) -> LayerSlots:
        """What a split has to know of a layer, without slots yet.

        Args:
            name: the node's.
            config: its attributes.
            d_model: last dimension of hidden_states.
            dtype: of hidden_states.
        """
        size = slot_bytes(config, d_model, dtype)
        return cls(name, config.expert_count, config.top_k, size)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.slots * self.slot_bytes

    @property
    def share(self) -> float:
        """Share of the layer's experts that fit; 1 for experts without weights."""
        return self.slots / self.experts if self.slot_bytes else 1.0


@dataclass(frozen=True)
class Budget:
    """What a budget holds.

    Attributes:
        given: bytes that were given.
        layers: in the model's order.
    """

    given: int
    layers: tuple[LayerSlots, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, at most ``given``."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def least(self) -> int:
        """The smallest budget that works: it holds the experts of one token in every layer."""
        return least_budget(self.layers)

    @property
    def whole(self) -> int:
        """Bytes of all experts: from here on nothing is streamed."""
        return sum(layer.experts * layer.slot_bytes for layer in self.layers)

    @property
    def slots(self) -> int:
        """Slots of all layers."""
        return sum(layer.slots for layer in self.layers)

    @property
    def experts(self) -> int:
        """Experts of all layers, without those that have no weights."""
        return sum(layer.experts for layer in self.layers if layer.slot_bytes)

    @property
    def share(self) -> float:
        """Share of the experts that fit."""
        return self.slots / self.experts if self.experts else 1.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "gpu_budget": self.given,
            "bytes": self.nbytes,
            "least": self.least,
            "all_experts": self.whole,
            "slots": self.slots,
            "experts": self.experts,
            "share": self.share,
            "layers": [
                {**vars(layer), "bytes": layer.nbytes, "share": layer.share}
                for layer in self.layers
            ],
        }


def split_budget(
    budget: ByteSize, layers: Sequence[HasExperts], what: str = "gpu_budget"
) -> Budget:
    """Splits a budget into slots for the layers of a model.

    Every layer first gets what one token needs: ``top_k`` slots, or one for each expert where there
    are fewer. From then on the next slot is always for the layer with the smallest share of its
    experts in slots, the first of them where shares are equal; a layer is done when all its experts
    have one. The split ends at the first slot that does not fit.

    So the order of slots does not depend on the budget: with a larger one no layer gets fewer.
    Shares differ by no more than one expert of a layer, but for layers that ``top_k`` or the number
    of experts holds apart. What is left over is less than the slot that would have been next.

    Args:
        budget: bytes, or a text such as ``8G``.
        layers: of the model, such as what :func:`moe_infer.inspect_model` tells.
        what: where the budget comes from, for messages.

    Raises:
        ValueError: it is no size, or less than one token's experts take; names the least that
            works.
    """
    given = parse_bytes(budget, what)
    least = least_budget(layers)
    if given < least:
        raise ValueError(
            f"{what}: {given} bytes ({format_bytes(given)}) of GPU memory do not hold the experts"
            f" of one token in {_count(layers)}; give at least {least} ({format_bytes(least)})"
        )
    slots = [_fewest(layer) for layer in layers]
    left = given - least
    for index in _order(layers):
        left -= layers[index].slot_bytes
        if left < 0:
            break
        slots[index] += 1
    return Budget(
        given,
        tuple(
            LayerSlots(layer.name, layer.experts, layer.top_k, layer.slot_bytes, n)
            for layer, n in zip(layers, slots, strict=True)
        ),
    )


def check_slot_options(max_concurrency: int | None, gpu_budget: ByteSize | None = None) -> None:
    """Checks what a caller says of slots, before anything is written.

    Raises:
        ValueError: both are given, ``max_concurrency`` is no number of experts, or ``gpu_budget``
            no size.
    """
    if gpu_budget is not None:
        parse_bytes(gpu_budget, "gpu_budget")
    if max_concurrency is None:
        return
    if gpu_budget is not None:
        raise ValueError(
            f"max_concurrency {max_concurrency} and gpu_budget {gpu_budget!r} are both given; give"
            " one of them"
        )
    whole = isinstance(max_concurrency, int) and not isinstance(max_concurrency, bool)
    if not whole or not 1 <= max_concurrency <= _MOST_SLOTS:
        raise ValueError(
            f"max_concurrency must be a number of experts from 1 to {_MOST_SLOTS}, got"
            f" {max_concurrency!r}"
        )


def least_budget(layers: Sequence[HasExperts]) -> int:
    """Bytes of the slots that one token needs."""
    return sum(_fewest(layer) * layer.slot_bytes for layer in layers)


def budget_from_environment() -> str | None:
    """The budget that ``MOE_INFER_GPU_BUDGET`` asks for; None if it is empty or not set."""
    return os.environ.get(BUDGET_VARIABLE) or None


def _fewest(layer: HasExperts) -> int:
    return min(layer.top_k, layer.experts) if layer.slot_bytes else 0


def _order(layers: Sequence[HasExperts]) -> Iterator[int]:
    """Layers that get the slots beyond the fewest, in order."""
    # Shares as multiples of one unit, since equal ones must be equal exactly.
    unit = math.lcm(*(layer.experts for layer in layers))
    steps = (
        (slots * (unit // layer.experts), index)
        for index, layer in enumerate(layers)
        if layer.slot_bytes
        for slots in range(_fewest(layer), layer.experts)
    )
    return (index for _, index in sorted(steps))


def _count(layers: Sequence[HasExperts]) -> str:
    count = sum(layer.slot_bytes > 0 for layer in layers)
    return f"each of {count} layers" if count > 1 else "the model's layer"
