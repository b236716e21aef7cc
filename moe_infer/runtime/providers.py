"""Which providers run a model, and which of them its MoELayer nodes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnxruntime as ort

from moe_infer.errors import PluginError
from moe_infer.graph.lower_fused import CPU_PROVIDER, CUDA_PROVIDER
from moe_infer.runtime import plugin
from moe_infer.runtime.once import Once

TENSORRT_PROVIDER = "TensorrtExecutionProvider"

_logger = logging.getLogger("moe_infer")
_said = Once()

Providers = Sequence[str | tuple[str, dict[Any, Any]]]


@dataclass(frozen=True)
class Choice:
    """What runs a model.

    Attributes:
        providers: name and options, in order.
        moe_provider: the one that runs the MoELayer nodes.
        reason: why not TensorRT, if nobody asked for the providers; else "".
    """

    providers: list[tuple[str, dict[Any, Any]]]
    moe_provider: str
    reason: str = ""


def normalize(
    providers: Providers | None, provider_options: Sequence[dict[Any, Any]] | None
) -> list[tuple[str, dict[Any, Any]]] | None:
    """Names and options, in order; None if no providers are asked for."""
    if providers is None:
        if provider_options is not None:
            raise ValueError("provider_options are given without providers; give both")
        return None
    if not providers:
        raise ValueError(f"providers is empty; available are {_available()}")
    given = provider_options if provider_options is not None else [{} for _ in providers]
    if len(given) != len(providers):
        raise ValueError(
            f"providers has {len(providers)} entries, but provider_options has {len(given)}"
        )
    pairs = []
    for provider, options in zip(providers, given, strict=True):
        name, own = (provider, {}) if isinstance(provider, str) else provider
        pairs.append((name, {**own, **options}))
    return pairs


def choose(asked: list[tuple[str, dict[Any, Any]]] | None, has_layers: bool) -> Choice:
    """What runs the model; see ``providers`` of the session."""
    available = ort.get_available_providers()
    if asked is None:
        return _best(available)
    names = [name for name, _ in asked]
    for name in names:
        if name not in available:
            message = f"{name} was asked for, but this ONNX Runtime has {', '.join(available)}"
            if name == TENSORRT_PROVIDER:
                raise PluginError(f"{message}; pip install 'moe-infer[gpu]' brings it")
            raise ValueError(f"{message}; choose among these or install another ONNX Runtime")
    if TENSORRT_PROVIDER in names:
        if has_layers and not (status := plugin.status()).usable:
            raise PluginError(f"{TENSORRT_PROVIDER} was asked for, but {status.reason}")
        return Choice(asked, TENSORRT_PROVIDER)
    return Choice(asked, CUDA_PROVIDER if CUDA_PROVIDER in names else CPU_PROVIDER)


def _best(available: Sequence[str]) -> Choice:
    if TENSORRT_PROVIDER not in available:
        reason = f"this ONNX Runtime has no {TENSORRT_PROVIDER} (pip install 'moe-infer[gpu]')"
    elif (status := plugin.status()).usable:
        names = (TENSORRT_PROVIDER, CUDA_PROVIDER, CPU_PROVIDER)
        return Choice([(name, {}) for name in names if name in available], TENSORRT_PROVIDER)
    else:
        reason = status.reason
    if CUDA_PROVIDER in available and plugin.gpu_count():
        return Choice([(CUDA_PROVIDER, {}), (CPU_PROVIDER, {})], CUDA_PROVIDER, reason)
    return Choice([(CPU_PROVIDER, {})], CPU_PROVIDER, reason)


def _available() -> str:
    return ", ".join(ort.get_available_providers())


def say_lowered_once(choice: Choice) -> None:
    """Warns that a model runs without TensorRT, the first time in a process."""
    if not _said.first():
        return
    _logger.warning(
        "MoELayer nodes are lowered to operators of %s, without TensorRT: %s",
        choice.moe_provider,
        choice.reason,
    )
