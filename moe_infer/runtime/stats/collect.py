"""Where the counters come from: the library's live layers, or a session that counts itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_infer.graph.lower_nodes import LayerNode
from moe_infer.runtime import native
from moe_infer.runtime.expert_use import UseTotals
from moe_infer.runtime.stats.counters import ExpertStats


def expert_stats() -> list[ExpertStats]:
    """The counters of every layer of the compiled library that is alive in this process.

    Layers in plain ``onnxruntime.InferenceSession`` are among them: no model is needed, so a layer
    is named after its weight file and prefix. Layers that were lowered to ONNX Runtime's operators
    are not in the library. May be called while other threads run sessions.

    Raises:
        moe_infer.PluginError: there is no library, hence no layers.
        RuntimeError: CUDA failed.
    """
    return [from_report(report) for report in native.live_layers()]


def from_report(report: native.LayerReport, name: str | None = None) -> ExpertStats:
    """The counters of one layer of the library.

    Args:
        report: what the library says.
        name: of the layer; None: made of file and prefix.
    """
    stats = report.stats
    weights = bool(report.weight_file)
    return ExpertStats(
        name=name or _name(report),
        where=f"CUDA device {report.device}",
        weight_file=report.weight_file,
        weight_prefix=report.weight_prefix,
        experts=report.expert_count,
        slots=report.slots if weights else None,
        slot_bytes=report.slot_bytes if weights else None,
        runs=stats.runs,
        tokens=stats.tokens,
        # Where all experts stay nobody counts which are needed, and none is ever missed.
        hits=stats.hits if report.streams else None,
        misses=stats.misses,
        evictions=stats.evictions,
        bytes_fetched=stats.bytes_fetched,
        prefetches_used=stats.prefetches_used,
        prefetches_wasted=stats.prefetches_wasted,
        prefetch_bytes_used=stats.prefetch_bytes_used,
        prefetch_bytes_wasted=stats.prefetch_bytes_wasted,
        stall_s=stats.stall_ns / 1e9 if stats.stall_ns >= 0 else None,
        uses=report.uses,
        slot_of_expert=report.slot_of_expert,
        id=report.id,
    )


def of_library(
    layers: Sequence[LayerNode],
    reports: Sequence[native.LayerReport],
    totals: Sequence[UseTotals] = (),
) -> list[ExpertStats]:
    """The counters of a model's layers, in the model's order.

    The library knows a layer by its file and prefix. Several sessions on one model have a layer
    each, and all of them are returned; nodes that share file and prefix share their entries.

    Args:
        layers: of the model.
        reports: of the library's live layers.
        totals: what the session counted by itself, one for each layer, or nothing.
    """
    found = []
    seen: set[int] = set()
    for i, layer in enumerate(layers):
        for report in reports:
            if report.id in seen or not _is_of(report, layer):
                continue
            seen.add(report.id)
            names = [other.name for other in layers if _is_of(report, other)]
            stats = from_report(report, ", ".join(names))
            if stats.uses is None and totals and len(names) == 1:
                stats = replace(stats, uses=totals[i].uses.copy())
            found.append(stats)
    return found


def of_lowered(
    layers: Sequence[LayerNode], provider: str, totals: Sequence[UseTotals] = ()
) -> list[ExpertStats]:
    """The counters of lowered layers: nothing but what the session counted by itself."""
    return [
        ExpertStats(
            name=layer.name,
            where=f"lowered for {provider}",
            weight_file=str(layer.weights.file.path) if layer.weights.file else "",
            weight_prefix=layer.config.expert_weight_prefix,
            experts=layer.config.expert_count,
            **(_counted(totals[i]) if totals else {}),
        )
        for i, layer in enumerate(layers)
    ]


def _counted(total: UseTotals) -> dict[str, Any]:
    return {"runs": total.runs, "tokens": total.tokens, "uses": total.uses.copy()}


def _name(report: native.LayerReport) -> str:
    if not report.weight_file:
        return f"{report.sublayer_type} #{report.id}"
    file = Path(report.weight_file).name
    return f"{file}: {report.weight_prefix}" if report.weight_prefix else file


def _is_of(report: native.LayerReport, layer: LayerNode) -> bool:
    config, file = layer.config, layer.weights.file
    if (
        report.weight_prefix != config.expert_weight_prefix
        or report.expert_count != config.expert_count
        or report.sublayer_type != config.expert_sublayer_type
    ):
        return False
    if file is None or not report.weight_file:
        return file is None and not report.weight_file
    with suppress(OSError):  # one of them may be gone by now
        return os.path.samefile(report.weight_file, file.path)
    return os.path.abspath(report.weight_file) == os.path.abspath(file.path)
