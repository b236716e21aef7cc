"""A MoE layer in a network built with TensorRT's Python API, without ONNX Runtime's session.

Device memory comes from PyCUDA or cuda-python, whichever is installed. The result is checked
against the float64 reference. Run: python examples/tensorrt_python.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import moe_infer
from moe_infer.reference import moe_layer
from moe_infer.weights import open_expert_weights, write_npz

EXPERTS, D_MODEL, HIDDEN, TOKENS = 6, 64, 128, 20


class PyCudaMemory:
    """Device memory and a stream through PyCUDA."""

    def __init__(self) -> None:
        import pycuda.autoinit  # noqa: F401  (makes the context)
        import pycuda.driver as driver

        self._driver = driver
        self._stream = driver.Stream()
        self._kept: list[Any] = []
        self.stream = self._stream.handle

    def allocate(self, size: int) -> int:
        self._kept.append(self._driver.mem_alloc(size))
        return int(self._kept[-1])

    def upload(self, address: int, array: np.ndarray[Any, Any]) -> None:
        self._driver.memcpy_htod(address, array)

    def download(self, array: np.ndarray[Any, Any], address: int) -> None:
        self._stream.synchronize()
        self._driver.memcpy_dtoh(array, address)


class CudaPythonMemory:
    """Device memory and a stream through cuda-python."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ModuleNotFoundError:
            from cuda import cudart as runtime  # before cuda-python 12.6

        self._runtime = runtime
        self.stream = int(self._checked(runtime.cudaStreamCreate()))

    def _checked(self, result: tuple[Any, ...]) -> Any:
        error, *values = result
        if int(error) != 0:
            raise RuntimeError(f"CUDA: {error}")
        return values[0] if values else None

    def allocate(self, size: int) -> int:
        return int(self._checked(self._runtime.cudaMalloc(size)))

    def upload(self, address: int, array: np.ndarray[Any, Any]) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._checked(self._runtime.cudaMemcpy(address, array.ctypes.data, array.nbytes, kind))

    def download(self, array: np.ndarray[Any, Any], address: int) -> None:
        self._checked(self._runtime.cudaStreamSynchronize(self.stream))
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._checked(self._runtime.cudaMemcpy(array.ctypes.data, address, array.nbytes, kind))


def device_memory() -> PyCudaMemory | CudaPythonMemory:
    for kind in (PyCudaMemory, CudaPythonMemory):
        try:
            return kind()
        except ModuleNotFoundError:
            continue
    sys.exit("no device memory: pip install pycuda, or pip install cuda-python")


def write_experts(path: Path) -> None:
    """The keys of InfMoE's npz files."""
    rng = np.random.default_rng(0)
    shapes = {
        "layer_norm_weight": (D_MODEL,),
        "wi_0_weight": (HIDDEN, D_MODEL),
        "wi_1_weight": (HIDDEN, D_MODEL),
        "wo_weight": (D_MODEL, HIDDEN),
    }
    write_npz(
        path,
        (
            (f"{e}/{name}", rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32))
            for e in range(EXPERTS)
            for name, shape in shapes.items()
        ),
    )


def build(trt: Any, logger: Any, attributes: dict[str, Any]) -> Any:
    """An engine with one input, the layer and one output; 1 to 64 tokens."""
    builder = trt.Builder(logger)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    hidden_states = network.add_input("hidden_states", trt.float32, (-1, D_MODEL))
    plugin = moe_infer.create_plugin(**attributes)
    layer = network.add_plugin_v3([hidden_states], [], plugin)
    layer.get_output(0).name = "output"
    network.mark_output(layer.get_output(0))
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("hidden_states", (1, D_MODEL), (TOKENS, D_MODEL), (64, D_MODEL))
    config.add_optimization_profile(profile)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        sys.exit("TensorRT could not build the engine; its log above says why")
    return trt.Runtime(logger).deserialize_cuda_engine(serialized)


def main() -> None:
    status = moe_infer.plugin_status()
    if not status.usable:
        sys.exit(f"this example needs TensorRT and a GPU: {status.reason}")
    try:
        import tensorrt as trt
    except ModuleNotFoundError:
        import tensorrt_bindings as trt

    memory = device_memory()
    rng = np.random.default_rng(1)
    x = rng.standard_normal((TOKENS, D_MODEL), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        attributes = {
            "expert_count": EXPERTS,
            "hidden_size": HIDDEN,
            "expert_sublayer_type": "T5_FF",
            "expert_weight_file": str(Path(folder, "experts.npz")),
            "expert_centroids": rng.normal(0, D_MODEL**-0.5, D_MODEL * EXPERTS).tolist(),
            "max_concurrency": 2,
        }
        write_experts(Path(folder, "experts.npz"))
        engine = build(trt, trt.Logger(trt.Logger.WARNING), attributes)
        context = engine.create_execution_context()
        y = np.empty_like(x)
        given, found = memory.allocate(x.nbytes), memory.allocate(y.nbytes)
        memory.upload(given, x)
        context.set_input_shape("hidden_states", x.shape)
        context.set_tensor_address("hidden_states", given)
        context.set_tensor_address("output", found)
        if not context.execute_async_v3(memory.stream):
            sys.exit("the run failed; TensorRT's log above says why")
        memory.download(y, found)
        config = moe_infer.LayerConfig.from_attributes(attributes)
        expected = moe_layer(x, config, open_expert_weights(config, D_MODEL))
    difference = np.abs(y - expected)
    print(f"TensorRT {trt.__version__}, {type(memory).__name__}: {TOKENS} tokens")
    print(f"largest difference from the reference: {difference.max():.2e}")
    if not (difference <= 1e-5 + 1e-4 * np.abs(expected)).all():
        sys.exit("the result is wrong")


if __name__ == "__main__":
    main()
