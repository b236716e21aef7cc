"""What a verification found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_infer.compare.difference import Difference, Tolerance


@dataclass(frozen=True)
class LayerDifference:
    """One MoELayer against what it replaced.

    Attributes:
        node: the MoELayer's name.
        replaced: name of the value in the original graph; "" if the node does not tell.
        difference: None if it could not be compared.
        reason: why it could not.
    """

    node: str
    replaced: str
    difference: Difference | None
    reason: str = ""


@dataclass(frozen=True)
class VerifyReport:
    """Result of :func:`moe_infer.verify`. True when all that was compared is within tolerance.

    Attributes:
        outputs: one for each output of the original.
        layers: one for each MoELayer, in the graph's order.
        tolerance: that decided.
        inputs: type and shape of what both graphs got.
        providers: what ran the original, and what ran the MoELayer nodes.
    """

    outputs: list[Difference]
    layers: list[LayerDifference]
    tolerance: Tolerance
    inputs: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    providers: tuple[str, str] = ("", "")

    def __bool__(self) -> bool:
        return all(d.same for d in self.differences)

    @property
    def differences(self) -> list[Difference]:
        """Of layers that could be compared, then of outputs."""
        return [*(d.difference for d in self.layers if d.difference is not None), *self.outputs]

    @property
    def largest(self) -> float:
        """Largest absolute difference of all outputs."""
        return max((d.largest for d in self.outputs), default=0.0)

    def __str__(self) -> str:
        lines = [
            f"original on {self.providers[0]}, rewritten on {self.providers[1]}",
            *(f"input {n}: {kind} {shape}" for n, (kind, shape) in self.inputs.items()),
        ]
        for layer in self.layers:
            told = _tell(layer.difference) if layer.difference else f"not compared: {layer.reason}"
            lines.append(f"layer {layer.node} for {layer.replaced or '?'}: {told}")
        lines += [f"output {d.name}: {_tell(d)}" for d in self.outputs]
        bad = sum(not d.same for d in self.differences)
        verdict = "all within" if not bad else f"{bad} of {len(self.differences)} not within"
        lines.append(f"{verdict} atol {self.tolerance.atol:g}, rtol {self.tolerance.rtol:g}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """For machines; infinity, which JSON lacks, becomes None."""
        return {
            "same": bool(self),
            "atol": self.tolerance.atol,
            "rtol": self.tolerance.rtol,
            "providers": list(self.providers),
            "inputs": {n: {"dtype": k, "shape": list(s)} for n, (k, s) in self.inputs.items()},
            "outputs": [_record(d) for d in self.outputs],
            "layers": [
                {
                    "node": layer.node,
                    "replaced": layer.replaced,
                    "reason": layer.reason,
                    "difference": _record(layer.difference) if layer.difference else None,
                }
                for layer in self.layers
            ],
        }


def _tell(difference: Difference) -> str:
    if difference.problem:
        return difference.problem
    text = f"largest difference {difference.largest:.3g} of values up to {difference.scale:.3g}"
    if difference.outside:
        text += (
            f", {difference.outside} of {math.prod(difference.shape)} outside; at"
            f" {difference.where} {difference.found:g}, expected {difference.expected:g}"
        )
    return text


def _record(difference: Difference) -> dict[str, Any]:
    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "name": difference.name,
        "same": difference.same,
        "shape": list(difference.shape),
        "largest": number(difference.largest),
        "mean": number(difference.mean),
        "scale": number(difference.scale),
        "outside": difference.outside,
        "where": list(difference.where),
        "expected": number(difference.expected),
        "found": number(difference.found),
        "problem": difference.problem,
    }
