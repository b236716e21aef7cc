"""examples/tensorrt_python.py without a GPU: all that it does but the builder's and the GPU's work.

The plugin, its registry and TensorRT's enumerations are real. Builder, engine and CUDA are
stand-ins: a recorder, the float64 reference, and host memory that is reached through addresses as
the GPU's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.needs_library, pytest.mark.needs_tensorrt]
ROOT = Path(__file__).resolve().parent.parent

SCRIPT = """
import ctypes, json, sys, types
from dataclasses import replace
from conftest import why_no_tensorrt
assert not why_no_tensorrt()
import numpy as np
import tensorrt as trt
import tensorrt_python as example
import moe_infer

FAULT, KIND = sys.argv[1:]
told = {}
allocated = {}


class Tensor:
    name = ""


class Layer:
    output = Tensor()

    def get_output(self, index):
        assert index == 0
        return self.output


class Network:
    def add_input(self, name, dtype, shape):
        told["input"] = [name, str(dtype), list(shape)]
        return "the input"

    def add_plugin_v3(self, inputs, shape_inputs, plugin):
        assert isinstance(plugin, trt.IPluginV3)
        core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
        told["plugin"] = [core.plugin_name, core.plugin_version, inputs, shape_inputs]
        return Layer()

    def mark_output(self, tensor):
        told["output"] = tensor.name


class Profile:
    def set_shape(self, name, smallest, usual, largest):
        told["profile"] = [name, smallest, usual, largest]


class Config:
    def add_optimization_profile(self, profile):
        told["profiles"] = told.get("profiles", 0) + 1


class Builder:
    def __init__(self, logger):
        assert isinstance(logger, trt.Logger)

    def create_network(self, flags):
        told["strongly_typed"] = flags == 1 << int(
            trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return Network()

    create_builder_config = lambda self: Config()
    create_optimization_profile = lambda self: Profile()

    def build_serialized_network(self, network, config):
        return None if FAULT == "build" else b"engine"


def array_at(address, shape):
    memory = next(m for m in allocated.values() if ctypes.addressof(m) == address)
    return np.frombuffer(memory, np.float32).reshape(shape)


class Context:
    def __init__(self):
        self.addresses = {}

    def set_input_shape(self, name, shape):
        assert name == "hidden_states"
        self.shape = tuple(shape)

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        told["stream"] = stream
        y = example.reference_of(array_at(self.addresses["hidden_states"], self.shape))
        out = array_at(self.addresses["output"], self.shape)
        out[...] = y + (1 if FAULT == "wrong" else 0)
        return FAULT != "run"


class Runtime:
    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, data):
        assert data == b"engine"
        return types.SimpleNamespace(create_execution_context=Context)


class Pointer(int):
    pass


def allocate(size):
    memory = (ctypes.c_uint8 * size)()
    allocated[len(allocated)] = memory
    return ctypes.addressof(memory)


# --- cuda-python: every function gives (error, value)
cudart = types.ModuleType("cuda.bindings.runtime")
cudart.cudaStreamCreate = lambda: (0, 77)
cudart.cudaMalloc = lambda size: (2, 0) if FAULT == "memory" else (0, allocate(size))
cudart.cudaStreamSynchronize = lambda stream: (0,)
cudart.cudaMemcpyKind = types.SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)


def copy(target, source, size, kind):
    ctypes.memmove(target, source, size)
    return (0,)


cudart.cudaMemcpy = copy

# --- PyCUDA
driver = types.ModuleType("pycuda.driver")
driver.Stream = lambda: types.SimpleNamespace(handle=88, synchronize=lambda: None)
driver.mem_alloc = allocate
driver.memcpy_htod = lambda address, array: ctypes.memmove(
    address, array.ctypes.data, array.nbytes)
driver.memcpy_dtoh = lambda array, address: ctypes.memmove(
    array.ctypes.data, address, array.nbytes)

for name in ("pycuda", "pycuda.autoinit", "pycuda.driver", "cuda", "cuda.bindings", "cuda.cudart"):
    sys.modules[name] = None  # not installed
if KIND == "pycuda":
    package = types.ModuleType("pycuda")
    package.driver, package.autoinit = driver, types.ModuleType("pycuda.autoinit")
    sys.modules.update({"pycuda": package, "pycuda.autoinit": package.autoinit,
                        "pycuda.driver": driver})
elif KIND == "cuda":
    bindings = types.ModuleType("cuda.bindings")
    bindings.runtime = cudart
    sys.modules.update({"cuda": types.ModuleType("cuda"), "cuda.bindings": bindings})
elif KIND == "old cuda":
    package = types.ModuleType("cuda")
    package.cudart = cudart
    sys.modules["cuda"] = package
    del sys.modules["cuda.bindings"]

# What the layer computes, from the attributes with which the example makes its plugin.
made = moe_infer.create_plugin


def remember(**attributes):
    config = moe_infer.LayerConfig.from_attributes(attributes)
    weights = example.open_expert_weights(config, example.D_MODEL)
    example.reference_of = lambda x: example.moe_layer(x, config, weights)
    return made(**attributes)


moe_infer.create_plugin = remember
status = moe_infer.plugin_status()
moe_infer.plugin_status = lambda: replace(status, usable=True)
trt.Builder, trt.Runtime = Builder, Runtime
sys.modules["tensorrt"] = trt
example.main()
print(json.dumps(told))
"""


def run(fault: str = "", kind: str = "cuda") -> subprocess.CompletedProcess[str]:
    paths = [ROOT, ROOT / "tests", ROOT / "examples", os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, fault, kind],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(p) for p in paths if p)},
    )


@pytest.mark.parametrize(
    ("kind", "stream", "name"),
    [
        ("cuda", 77, "CudaPythonMemory"),
        ("old cuda", 77, "CudaPythonMemory"),
        ("pycuda", 88, "PyCudaMemory"),
    ],
)
def test_the_network_and_the_run(kind: str, stream: int, name: str) -> None:
    done = run(kind=kind)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second, last = done.stdout.splitlines()
    assert name in first
    assert "largest difference from the reference: 0" in second or "e-0" in second
    told: dict[str, Any] = json.loads(last)
    assert told == {
        "strongly_typed": True,
        "input": ["hidden_states", "DataType.FLOAT", [-1, 64]],
        "plugin": ["MoELayer", "1", ["the input"], []],
        "output": "output",
        "profile": ["hidden_states", [1, 64], [20, 64], [64, 64]],
        "profiles": 1,
        "stream": stream,
    }


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("build", "cuda", "TensorRT could not build the engine"),
        ("run", "cuda", "the run failed"),
        ("wrong", "cuda", "the result is wrong"),
        ("memory", "cuda", "CUDA: 2"),
        ("", "none", "pip install pycuda, or pip install cuda-python"),
    ],
)
def test_faults_end_it(fault: str, kind: str, message: str) -> None:
    done = run(fault, kind)
    assert done.returncode == 1
    assert message in done.stderr


def test_without_a_gpu_it_says_so() -> None:
    call = [sys.executable, "examples/tensorrt_python.py"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return  # here is one, and the result was right
    assert "this example needs TensorRT and a GPU" in done.stderr
