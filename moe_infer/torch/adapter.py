"""What a MoE module must tell about itself to be replaced.

An adapter is a small class: it says which modules it takes, what they compute as attributes of the
operator and where their experts' weights are, and puts a layer in the module's place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moe_infer.torch.layer import MoELayer


@dataclass(frozen=True)
class Weight:
    """Where one part of the experts' weights is; made by :func:`stacked` or :func:`separate`.

    Attributes:
        parameters: what holds it; each is freed when all that is in it has been written.
        expert: the part of expert ``e``, a view, in the shape that
            :data:`moe_infer.op.SUBLAYERS` gives for the part.
    """

    parameters: tuple[Tensor, ...]
    expert: Callable[[int], Tensor]


def stacked(parameter: Tensor, rows: slice | None = None, transpose: bool = False) -> Weight:
    """A part inside a tensor of all experts, (experts, rows, columns) or (experts, rows).

    Args:
        parameter: the tensor; axis 0 is the expert.
        rows: which rows of an expert's matrix are the part's, after ``transpose``; all by default.
        transpose: the tensor is (experts, columns, rows).
    """

    def expert(e: int) -> Tensor:
        matrix = parameter[e]
        matrix = matrix.T if transpose else matrix
        return matrix if rows is None else matrix[rows]

    return Weight((parameter,), expert)


def separate(parameters: Sequence[Tensor], transpose: bool = False) -> Weight:
    """A part with a tensor of its own for each expert, in the experts' order."""
    held = tuple(parameters)

    def expert(e: int) -> Tensor:
        return held[e].T if transpose else held[e]

    return Weight(held, expert)


@dataclass(frozen=True)
class MoEDescription:
    """What one MoE module computes.

    Attributes:
        d_model: last dimension of the hidden states.
        attributes: of the operator (docs/operator.md), without the weight file's;
            ``expert_count``, ``hidden_size`` and ``expert_sublayer_type`` are required.
        weights: by the parts' names in :data:`moe_infer.op.SUBLAYERS`, such as ``gate_weight``;
            with biases also theirs.
    """

    d_model: int
    attributes: Mapping[str, Any]
    weights: Mapping[str, Weight]


class MoEAdapter(ABC):
    """Knows one kind of MoE modules. Subclass it and call :func:`register_adapter`."""

    classes: tuple[str | type, ...] = ()
    """Names of module classes, or the classes; what :meth:`takes` goes by."""

    def takes(self, module: nn.Module) -> bool:
        """True when the module is one of ``classes``; a subclass of one is another module."""
        kind = type(module)
        return any(c == kind.__name__ if isinstance(c, str) else c is kind for c in self.classes)

    @abstractmethod
    def describe(self, module: nn.Module) -> MoEDescription:
        """What the module computes and where its weights are; changes nothing.

        Raises:
            ValueError: the module is one that MoELayer cannot stand for; says why.
        """

    @abstractmethod
    def install(self, module: nn.Module, layer: MoELayer) -> nn.Module:
        """What takes the module's place: a new module, or the given one with its parts exchanged.

        ``layer(hidden_states, router_logits)`` takes (..., d_model) and (..., expert_count).
        """


class RoutedExperts(nn.Module):  # type: ignore[misc]
    """A router that gives logits and a MoELayer: all that many MoE modules are.

    Args:
        router: hidden states (..., d_model) to logits (..., expert_count), before any softmax.
        layer: the MoELayer.
    """

    def __init__(self, router: nn.Module, layer: MoELayer) -> None:
        super().__init__()
        self.router, self.layer = router, layer

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., d_model) to the same."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        output: Tensor = self.layer(flat, self.router(flat))
        return output.reshape(hidden_states.shape)


_REGISTERED: list[MoEAdapter] = []


def register_adapter(adapter: MoEAdapter) -> MoEAdapter:
    """Makes an adapter known to :func:`moe_infer.torch.replace_moe`; the last one goes first."""
    if not isinstance(adapter, MoEAdapter):
        raise TypeError(f"an adapter must be an instance of MoEAdapter, got {adapter!r}")
    _REGISTERED.insert(0, adapter)
    return adapter


def find_adapter(module: nn.Module, extra: Sequence[MoEAdapter] = ()) -> MoEAdapter | None:
    """The first adapter that takes a module."""
    from moe_infer.torch.transformers_adapters import ADAPTERS

    return next((a for a in (*extra, *_REGISTERED, *ADAPTERS) if a.takes(module)), None)
