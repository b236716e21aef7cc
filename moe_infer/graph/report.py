"""What a rewrite found and did."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from moe_infer.byte_size import format_bytes
from moe_infer.graph.guess_next import GuessReport
from moe_infer.graph.match import NearMiss
from moe_infer.op import LayerConfig

_MORE = (
    "n_group",
    "topk_group",
    "routed_scaling_factor",
    "router_jitter",
    "activation_alpha",
    "activation_beta",
    "swiglu_limit",
)


@dataclass(frozen=True)
class LayerReport:
    """One block that became a MoELayer."""

    index: int
    family: str
    node_name: str
    output: str
    config: LayerConfig
    d_model: int
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    """Type and shape by name in the weight file."""
    constants: tuple[str, ...]
    """Names that the weights had in the graph."""
    nbytes: int
    """Of the experts in the weight file."""
    removed_nodes: tuple[str, ...]

    def __str__(self) -> str:
        c = self.config
        normalized = ", normalised" if c.normalize_routing_weights else ""
        more = "".join(f", {name} {c.to_attributes()[name]:g}" for name in self._more())
        return (
            f"layer {self.index}: {self.node_name}: {c.expert_count} experts"
            f" {c.expert_sublayer_type} {self.d_model} x {c.hidden_size}, {c.moe_variant}"
            f" top {c.top_k}{normalized}{more},"
            f" {format_bytes(self.nbytes)}, in place of {len(self.removed_nodes)} nodes (family"
            f" '{self.family}')"
        )

    def _more(self) -> list[str]:
        """Attributes that differ from their defaults and are worth a word."""
        return [name for name in _MORE if name in self.config.to_attributes()]


@dataclass
class RewriteReport:
    """Result of :func:`moe_infer.rewrite`. False when nothing was rewritten."""

    layers: list[LayerReport] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    """Parts of blocks that were left as they were, the nearest to a match first."""
    wrong_export: bool = False
    """The exporter left parts of the model out, see the near misses; nothing was written."""
    model_path: Path | None = None
    """None when nothing matched: nothing is written then."""
    data_path: Path | None = None
    expert_weight_path: Path | None = None
    untyped_values: list[str] = field(default_factory=list)
    """Values without type and shape; TensorRT's provider may refuse the graph because of them."""
    guesses: GuessReport | None = None
    """Of the next layers' experts; None unless ``fetch_ahead`` was asked for."""

    def __bool__(self) -> bool:
        return bool(self.layers)

    def __str__(self) -> str:
        lines = [str(layer) for layer in self.layers]
        if self.layers:
            total = format_bytes(sum(layer.nbytes for layer in self.layers))
            count = _count(len(self.layers), "MoE layer")
            lines.insert(0, f"{count} rewritten, {total} of experts:")
        elif self.wrong_export:
            lines.append("the export is wrong; nothing was written")
        else:
            lines.append("no MoE layer was found; nothing was written")
        if self.near_misses:
            title = "left as they were" if self.layers else "the nearest to one"
            title = "why" if self.wrong_export else title
            lines.append(f"{title}:")
            told = [m for m in self.near_misses if m.wrong_export or not self.wrong_export]
            lines += [f"  {miss}" for miss in told]
        elif not self.layers:
            lines.append("the graph has no TopK and no ArgMax that could choose experts")
        if self.guesses is not None:
            lines.append(str(self.guesses))
        for label, path in (
            ("model", self.model_path),
            ("other weights", self.data_path),
            ("experts", self.expert_weight_path),
        ):
            if path is not None:
                lines.append(f"{label}: {path}")
        if self.untyped_values:
            shown = [*self.untyped_values[:5], *["..."] * (len(self.untyped_values) > 5)]
            count = _count(len(self.untyped_values), "value")
            lines.append(
                f"{count} without type and shape, which TensorRT may refuse: {', '.join(shown)}"
            )
        return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
