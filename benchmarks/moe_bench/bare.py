"""MoELayer through the library's C entry: the bare kernels."""

from __future__ import annotations

from typing import Any

import torch

from moe_bench.cases import Case
from moe_bench.inputs import InputSet
from moe_infer.runtime.native import Layer


class BareLayer:
    """One resident layer, with memory from PyTorch.

    Args:
        case: the layer.
        dtype: of its inputs.
        path: its weight file.
    """

    def __init__(self, case: Case, dtype: str, path: Any) -> None:
        self.layer = Layer(case.attributes(path), case.d_model, dtype, True, dtype)
        self._workspace = torch.empty(0, dtype=torch.uint8, device="cuda")

    def bind(self, sets: list[InputSet]) -> BoundRuns:
        """Outputs and workspace for runs of these sets, one after the other."""
        needed = self.layer.workspace(len(sets[0].hidden_states))
        if needed > len(self._workspace):
            self._workspace = torch.empty(needed, dtype=torch.uint8, device="cuda")
        return BoundRuns(self.layer, self._workspace, sets)

    def close(self) -> None:
        """Frees the layer's memory."""
        self.layer.close()
        self._workspace = torch.empty(0, dtype=torch.uint8, device="cuda")


class BoundRuns:
    """Runs of one layer, each with inputs and an output of its own."""

    def __init__(self, layer: Layer, workspace: torch.Tensor, sets: list[InputSet]) -> None:
        self._layer, self._workspace, self._sets = layer, workspace, sets
        self.outputs = [torch.empty_like(s.hidden_states) for s in sets]

    def run(self) -> None:
        """Enqueues all runs on the current stream."""
        stream = torch.cuda.current_stream().cuda_stream
        for given, output in zip(self._sets, self.outputs, strict=True):
            self._layer.run(
                given.hidden_states.data_ptr(),
                given.logits.data_ptr(),
                output.data_ptr(),
                len(given.hidden_states),
                self._workspace.data_ptr(),
                len(self._workspace),
                stream,
            )

    def poison(self) -> None:
        """Fills the outputs with NaN, so that what is not written is seen."""
        for output in self.outputs:
            output.fill_(float("nan"))
