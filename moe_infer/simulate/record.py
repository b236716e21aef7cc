"""Traces recorded from a model with MoELayer nodes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from moe_infer.simulate.trace import Trace


def record(
    model: Any | str | os.PathLike[str],
    runs: Iterable[Mapping[str, np.ndarray[Any, Any]]],
    source: str = "",
) -> Trace:
    """Runs a model and keeps what its tokens chose.

    A causal model that runs over a whole text chooses as it does when it writes that text token by
    token, so one run records one sequence of a decoder.

    Args:
        model: a :class:`moe_infer.InferenceSession` made with ``expert_use=True``, or the path of a
            model, which then runs on the CPU.
        runs: inputs of each run, one sequence (batch 1) each; all of the same length.
        source: where the trace comes from, for people.

    Raises:
        ValueError: the model has no layer, its layers differ in their number of experts or top_k,
            the sequences differ in length, or the session was made without ``expert_use=True``.
    """
    from moe_infer.runtime.session import InferenceSession

    session: Any = model
    if not isinstance(model, InferenceSession):
        session = InferenceSession(model, providers=["CPUExecutionProvider"], expert_use=True)
    layers = session.moe_layers
    if not layers:
        raise ValueError("the model has no MoELayer; `moe-infer rewrite` makes them")
    kinds = {(layer.experts, layer.top_k) for layer in layers}
    if len(kinds) != 1:
        raise ValueError(
            "a trace needs layers that have the same number of experts and the same top_k, got"
            f" {sorted(kinds)}"
        )
    expert_count, _ = kinds.pop()
    sequences = [np.stack(session.expert_choices(feeds)) for feeds in runs]
    if len({sequence.shape for sequence in sequences}) != 1:
        found = sorted({sequence.shape[1] for sequence in sequences})
        raise ValueError(f"a trace needs sequences of one length, got {found} tokens")
    choices = np.stack(sequences, axis=1)
    return Trace(expert_count, choices, tuple(layer.name for layer in layers), source)
