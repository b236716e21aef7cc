"""A session's GPU budget: slots for the layers of the model in memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import onnx

from moe_infer.budget import BUDGET_VARIABLE, Budget, budget_from_environment
from moe_infer.byte_size import ByteSize, parse_bytes
from moe_infer.graph.lower_nodes import LayerNode
from moe_infer.graph.update import split_layers, update_layers, with_slots
from moe_infer.runtime.once import Once
from moe_infer.runtime.providers import Choice

_logger = logging.getLogger("moe_infer")
_said = Once()


@dataclass(frozen=True)
class GivenBudget:
    """A budget and where it comes from."""

    nbytes: int
    what: str


def given_budget(argument: ByteSize | None) -> GivenBudget | None:
    """The argument, else what the environment says."""
    what, value = "gpu_budget", argument
    if value is None:
        what, value = f"environment variable {BUDGET_VARIABLE}", budget_from_environment()
    return None if value is None else GivenBudget(parse_bytes(value, what), what)


def apply_budget(
    budget: GivenBudget, model: onnx.ModelProto, layers: list[LayerNode]
) -> tuple[Budget, list[LayerNode]]:
    """Splits a budget and gives the model's layers these slots; the model is changed in place."""
    split = split_layers(budget.nbytes, layers, budget.what)
    pairs = zip(layers, split.layers, strict=True)
    configs = [with_slots(layer, part.slots) for layer, part in pairs]
    _logger.info(
        "%s of %d bytes: %d of %d experts have a slot, in %d bytes",
        budget.what,
        split.given,
        split.slots,
        split.experts,
        split.nbytes,
    )
    return split, update_layers(model, layers, configs)


def say_budget_once(budget: GivenBudget, choice: Choice) -> None:
    """Warns that a budget has no effect, the first time in a process."""
    if not _said.first():
        return
    _logger.warning(
        "%s has no effect: the layers are lowered to operators of %s, which have no slots",
        budget.what,
        choice.moe_provider,
    )
