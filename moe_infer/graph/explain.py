"""What a rewrite would do and why not more, without writing anything."""

from __future__ import annotations

import os
from dataclasses import dataclass

import onnx

from moe_infer.graph.match import GraphView, Match, NearMiss
from moe_infer.graph.report import RewriteReport
from moe_infer.graph.rewrite import find_layers, load_model
from moe_infer.graph.shapes import infer_types

REACHED = {
    0: "the router's scores",
    1: "the choice of experts",
    2: "the experts' weights",
    3: "the experts' first projections",
    4: "the experts' last projection",
    5: "the weighted sum",
}
"""What a near miss got to, by its stage."""


@dataclass(frozen=True)
class Explanation:
    """Every node at which a MoE block may begin, and how far the nearest pattern went from it."""

    layers: tuple[Match, ...]
    near_misses: tuple[NearMiss, ...]
    """The nearest to a match first."""
    wrong_export: bool

    def __bool__(self) -> bool:
        return bool(self.layers) and not self.wrong_export

    def __str__(self) -> str:
        count = len(self.layers) + len(self.near_misses)
        if not count:
            return "no candidates: the graph has no TopK and no ArgMax that could choose experts"
        lines = [f"{count} candidate{'s' * (count != 1)}:"]
        for match in self.layers:
            lines += [f"{match.anchor}", f"  matches family '{match.family}': {_summary(match)}"]
        for miss in self.near_misses:
            lines += [
                f"{miss.anchor}",
                f"  nearest is family '{miss.family}', which reached {_reached(miss)}",
                f"  stopped at {miss.node}",
                f"  because: {miss.reason}",
            ]
        if self.wrong_export:
            lines.append("the export is wrong; a rewrite would write nothing")
        return "\n".join(lines)


def explain(
    model: str | os.PathLike[str] | onnx.ModelProto,
    *,
    base_dir: str | os.PathLike[str] | None = None,
    copy_shared_weights: bool = False,
) -> Explanation:
    """Looks for MoE blocks as :func:`moe_infer.rewrite` does, and writes nothing.

    Args:
        model: path of an ONNX model, or the model itself (not changed).
        base_dir: folder of the external data when ``model`` is no path.
        copy_shared_weights: as for a rewrite.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it is no ONNX model, or its external data is refused.
    """
    proto, folder = load_model(model, base_dir)
    report = RewriteReport()
    view = GraphView(proto, infer_types(proto), folder)
    layers = find_layers(view, report, copy_shared_weights)
    matches = tuple(match for match, _ in layers)
    return Explanation(matches, tuple(report.near_misses), report.wrong_export)


def _summary(match: Match) -> str:
    normalized = ", normalised" if match.normalize else ""
    return (
        f"{match.expert_count} experts {match.sublayer} {match.d_model} x {match.hidden_size},"
        f" {match.router} top {match.top_k}{normalized}; from '{match.hidden_states}' and"
        f" '{match.router_logits}' to '{match.output}'"
    )


def _reached(miss: NearMiss) -> str:
    if miss.wrong_export:
        return "a block of which parts are missing"
    return REACHED.get(miss.stage, "a whole block" if miss.stage > 5 else "none of its parts")
