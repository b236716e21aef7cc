"""Why torch.onnx.export could not export a MoE model, in one line with the remedy.

The exporters fail in their own words: an operator without translation, a guard on data, a module
that cannot be converted while it is traced. What helps is the same few things.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_BATCHED = (
    "call model.set_experts_implementation('batched_mm') before the export, as `moe-infer export`"
    " does"
)
_INSERT = (
    "or put MoELayer in before the export with moe_infer.torch.replace_moe(model, FILE)"
    " (`moe-infer export --insert`)"
)


@dataclass(frozen=True)
class _Kind:
    pattern: re.Pattern[str]
    """Of the text of one of the exceptions."""
    reason: str
    remedy: str


_KINDS: tuple[_Kind, ...] = (
    _Kind(
        re.compile(r"grouped_mm|Grouped matmul|aten::histc"),
        "the experts are computed by grouped_mm, transformers' default, which"
        " torch.onnx.export cannot translate",
        f"{_BATCHED}, {_INSERT}",
    ),
    _Kind(
        re.compile(r"swap Linear\.weight|_apply\(\): Couldn't swap"),
        "the router converts its weights while it is traced, which torch.export cannot follow"
        " (Switch Transformers)",
        "put MoELayer in before the export with moe_infer.torch.replace_moe(model, FILE), or export"
        " with dynamo=False and a sample input that reaches every expert",
    ),
    _Kind(
        re.compile(r"unordered_map::at"),
        "transformers 4 builds its attention mask in a way that the TorchScript exporter cannot"
        " trace",
        f"export with dynamo=True and transformers 5: {_BATCHED}",
    ),
    _Kind(
        re.compile(r"[Dd]ata-dependent"),
        "the model loops over the experts that its input chose, so the graph would depend on the"
        " sample input{where}",
        f"with transformers 5 {_BATCHED}, {_INSERT}",
    ),
)
"""The first that fits counts."""

_WHERE = re.compile(r"(modeling_\w+\.py)(?:\", line |:)(\d+)")


def explain_export_error(error: BaseException) -> str | None:
    """What keeps a MoE model from being exported, and the remedy.

    Args:
        error: from ``torch.onnx.export`` or ``torch.export.export``, either exporter.

    Returns:
        One line; None for an error that is not of a kind that is known.
    """
    texts = [f"{type(e).__name__}: {e}" for e in _chain(error)]
    for kind in _KINDS:
        if any(kind.pattern.search(text) for text in texts):
            return f"{kind.reason.format(where=_where(texts))}; {kind.remedy}"
    return None


def _where(texts: list[str]) -> str:
    found = [m for text in texts for m in _WHERE.finditer(text)]
    return f" ({found[0].group(1)}, line {found[0].group(2)})" if found else ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__
