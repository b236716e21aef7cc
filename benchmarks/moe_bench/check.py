"""Results against the layer in float64, on the GPU, before a time counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_bench.cases import Case
from moe_bench.inputs import InputSet
from moe_bench.weights import Experts
from moe_infer.op import RMS_NORM_EPSILON

TOLERANCES = {
    "float16": (2e-3, 2e-3),
    "bfloat16": (1.6e-2, 1.6e-2),
    "float32": (1e-5, 1e-4),
}
"""(absolute, relative), on every element; the design's."""
PEER_NORM = {"float16": 2.5e-3, "bfloat16": 2e-2}
"""Relative error in the norm up to which a peer that rounds more often is still taken as right."""
CHECKED_TOKENS = 32


class WrongResultError(Exception):
    """A contender's output is not the layer's."""


@dataclass(frozen=True)
class Expected:
    """A sample of one set's output in float64.

    Attributes:
        tokens: which rows, int64.
        values: (len(tokens), d_model).
    """

    tokens: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class Error:
    """How far an output is from the reference.

    Attributes:
        largest: largest absolute difference.
        norm: norm of the difference over the norm of the reference.
        beyond: how many elements of how many are beyond the tolerance, and the worst of them; ""
            where none is.
    """

    largest: float
    norm: float
    beyond: str = ""

    @property
    def within(self) -> bool:
        """Every element is within the tolerance."""
        return not self.beyond


def expect(
    case: Case, experts: Experts, given: InputSet, seed: int = 2, sublayer: str | None = None
) -> Expected:
    """The reference for a random sample of tokens, all of them where there are few.

    Args:
        case: the layer.
        experts: its weights.
        given: the inputs.
        seed: of the sample.
        sublayer: instead of the case's, for a contender that computes another one.
    """
    total = len(given.hidden_states)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    tokens = order[:CHECKED_TOKENS].to(given.chosen.device)
    x = given.hidden_states[tokens].double()
    chosen = given.chosen[tokens]
    weights = routing_weights(case, given.logits[tokens].double(), chosen)
    values = torch.zeros_like(x)
    for e in chosen.unique().tolist():
        rows, rank = (chosen == e).nonzero(as_tuple=True)
        y = expert_output(sublayer or case.sublayer, experts, e, x[rows])
        values.index_add_(0, rows, weights[rows, rank, None] * y)
    return Expected(tokens, values)


def routing_weights(case: Case, logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Weights of the chosen experts, (tokens, top_k)."""
    if case.router == "default":
        return torch.ones_like(chosen, dtype=logits.dtype)
    weights = logits.softmax(-1).gather(1, chosen)
    return weights / weights.sum(-1, keepdim=True) if case.normalize else weights


def expert_output(sublayer: str, experts: Experts, e: int, x: torch.Tensor) -> torch.Tensor:
    """One expert for rows x, in x's type.

    Args:
        sublayer: "Gated_SiLU", "Gated_GELU" (by tanh) or "T5_FF" (that with norm and residual).
        experts: the weights.
        e: which expert.
        x: (rows, d_model).
    """
    n = x
    if sublayer == "T5_FF":
        assert experts.layer_norm is not None
        scale = torch.rsqrt((x * x).mean(-1, keepdim=True) + RMS_NORM_EPSILON)
        n = experts.layer_norm[e].to(x) * x * scale
    gate, up = (n @ experts.gate_up[e].to(x.dtype).T).chunk(2, dim=-1)
    if sublayer == "Gated_SiLU":
        inner = torch.nn.functional.silu(gate) * up
    else:
        inner = torch.nn.functional.gelu(gate, approximate="tanh") * up
    y = inner @ experts.down[e].to(x.dtype).T
    return x + y if sublayer == "T5_FF" else y


def compare(found: torch.Tensor, expected: Expected, dtype: str) -> Error:
    """Difference of an output from its reference; NaN and infinity are never within.

    Raises:
        WrongResultError: a value of the whole output, not only of the sample, is not finite.
    """
    finite = found.isfinite()
    if not bool(finite.all()):
        count = int((~finite).sum())
        raise WrongResultError(f"{count} of {finite.numel()} values are NaN or infinite")
    atol, rtol = TOLERANCES[dtype]
    difference = (found[expected.tokens].double() - expected.values).abs()
    tolerance = atol + rtol * expected.values.abs()
    within = difference <= tolerance
    norm = difference.norm() / expected.values.norm()
    beyond = ""
    if not bool(within.all()):
        count, total = int((~within).sum()), within.numel()
        row, column = divmod(int((difference / tolerance).argmax()), within.shape[1])
        beyond = (
            f"{count} of {total} values are not within the tolerance, the worst is token"
            f" {int(expected.tokens[row])}, column {column}:"
            f" {float(found[expected.tokens[row], column]):.9g} for"
            f" {float(expected.values[row, column]):.9g}"
        )
    return Error(float(difference.max()), float(norm), beyond)


def judge(error: Error, dtype: str, peer: bool) -> str:
    """A note for the table, "" if there is nothing to say.

    Args:
        error: of one output.
        dtype: of the layer.
        peer: not ours: it may round more often than the tolerance allows for, which is noted.

    Raises:
        WrongResultError: the result is not the layer's.
    """
    if error.within:
        return ""
    text = f"largest difference {error.largest:.3g}, in the norm {error.norm:.3g}"
    if peer and error.norm <= PEER_NORM[dtype]:
        return f"rounds more than the tolerance allows: {text}"
    raise WrongResultError(f"wrong result: {text}; {error.beyond}")
