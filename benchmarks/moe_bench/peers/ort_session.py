"""A session of ONNX Runtime with its inputs and output bound to memory of PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnxruntime as ort
import torch
from onnx import TensorProto

from moe_bench.inputs import InputSet
from moe_bench.peers.ort_models import names
from moe_bench.peers.peer import Entry, Problem, UnavailableError, rotate
from moe_bench.weights import TORCH_DTYPES

TENSORRT = "TensorrtExecutionProvider"
CUDA = "CUDAExecutionProvider"
NO_GRAPH = "-1"

_ELEMENTS = {
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float16: TensorProto.FLOAT16,
    torch.float32: TensorProto.FLOAT,
}


def require_provider(name: str) -> None:
    """Checks that this ONNX Runtime has an execution provider.

    Raises:
        UnavailableError: it has not.
    """
    available = ort.get_available_providers()
    if name not in available:
        raise UnavailableError(
            f"ONNX Runtime {ort.__version__} has no {name}, only {', '.join(available)}"
        )


def make_session(
    model: str | bytes, provider: str, options: dict[str, Any], stream: torch.cuda.Stream
) -> ort.InferenceSession:
    """Stock ONNX Runtime on one provider and the given stream; never falls back to another."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    chosen = {"device_id": "0", "user_compute_stream": str(stream.cuda_stream), **options}
    return ort.InferenceSession(model, settings, [(provider, chosen)], enable_fallback=0)


class BoundSession:
    """Runs a graph of layers on buffers of its own.

    Args:
        session: of a model by ``ort_models``.
        problem: what its layers are.
        tokens: in the buffers.
        layers: in the graph.
        casts: the model's inputs and outputs are float32.
        graph_id: for ``gpu_graph_id``; NO_GRAPH: not captured; None: the provider captures by
            itself or not at all.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        problem: Problem,
        tokens: int,
        layers: int = 1,
        casts: bool = False,
        graph_id: str | None = None,
    ) -> None:
        case = problem.case
        kind = torch.float32 if casts else TORCH_DTYPES[problem.dtype]
        device = problem.experts.down.device
        widths = (case.d_model, case.experts, case.d_model)
        self._session, self._binding = session, session.io_binding()
        self._buffers: list[list[torch.Tensor]] = []
        for layer in range(layers):
            buffers = [torch.zeros((tokens, w), dtype=kind, device=device) for w in widths]
            x, logits, y = names(layer)
            self._binding.bind_input(x, *_place(buffers[0]))
            self._binding.bind_input(logits, *_place(buffers[1]))
            self._binding.bind_output(y, *_place(buffers[2]))
            self._buffers.append(buffers)
        self._options = ort.RunOptions()
        # What follows on the stream waits for the run anyway.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if graph_id is not None:
            self._options.add_run_config_entry("gpu_graph_id", graph_id)

    def run(self) -> None:
        """Enqueues one run; ONNX Runtime may wait for it."""
        self._session.run_with_iobinding(self._binding, self._options)

    def load(self, given: InputSet, layer: int = 0) -> None:
        """Copies a set into the buffers of one layer."""
        x, logits, _ = self._buffers[layer]
        x.copy_(given.hidden_states)
        logits.copy_(given.logits)

    def warm_up(self, times: int = 4) -> None:
        """Runs until everything is allocated, tuned and, where it is to be, captured."""
        for _ in range(times):
            self.run()
        if self._buffers[0][0].is_cuda:
            torch.cuda.synchronize()

    def single(self, sets: list[InputSet], **more: Any) -> Entry:
        """Runs of a graph of one layer, the sets in turn."""
        output = self._buffers[0][2]

        def results() -> Iterator[tuple[int, torch.Tensor]]:
            for i, given in enumerate(sets):
                self.load(given)
                output.fill_(float("nan"))
                self.run()
                yield i, output

        return Entry(self.run, 1, results, len(sets), rotate(sets, self.load), **more)

    def model(self, sets: list[InputSet], **more: Any) -> Entry:
        """Runs of a graph of several layers, each with a set of its own."""
        for layer in range(len(self._buffers)):
            self.load(sets[layer % len(sets)], layer)

        def results() -> Iterator[tuple[int, torch.Tensor]]:
            for _, _, output in self._buffers:
                output.fill_(float("nan"))
            self.run()
            for layer, (_, _, output) in enumerate(self._buffers):
                yield layer % len(sets), output

        return Entry(self.run, 1, results, len(self._buffers), **more)


def _place(tensor: torch.Tensor) -> tuple[str, int, int, list[int], int]:
    """Device type, device, element type, shape and address, as IOBinding takes them."""
    return tensor.device.type, 0, _ELEMENTS[tensor.dtype], list(tensor.shape), tensor.data_ptr()
