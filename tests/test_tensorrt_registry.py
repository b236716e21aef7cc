"""The compiled plugin inside the real TensorRT registry, without a GPU.

Each check runs in a process of its own, so that a crash is a failure and not the end of the tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from layer_models import layer_attributes, make_parts, write_experts
from moe_infer.op import ATTRIBUTES
from moe_infer.runtime import plugin

pytestmark = [pytest.mark.needs_library, pytest.mark.needs_tensorrt]
ROOT = Path(__file__).resolve().parent.parent
EXPERTS, D_MODEL, HIDDEN = 4, 8, 12

# What every script begins with: a TensorRT in the process, then moe_infer, as an application would.
PREFIX = """
import json, sys
from conftest import why_no_tensorrt
assert not why_no_tensorrt()
import tensorrt as trt
import moe_infer
from moe_infer.runtime import plugin
library = plugin.load()
registry = trt.get_plugin_registry()
"""


def run(script: str, *arguments: str, expect: int = 0, prefix: str = PREFIX) -> str:
    """Runs a Python script in a new process and gives what it printed."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", prefix + textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    assert done.returncode == expect, f"exit status {done.returncode}: {done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    parts = make_parts("T5_FF", EXPERTS, D_MODEL, HIDDEN, "float32")
    return write_experts(tmp_path / "w", parts, "T5_FF", EXPERTS, "npz stored")


def test_create_plugin_with_every_kind_of_attribute(tmp_path: Path) -> None:
    parts = make_parts("Clamped_SwiGLU", EXPERTS, D_MODEL, HIDDEN, "float32", bias=True)
    path = write_experts(tmp_path / "w", parts, "Clamped_SwiGLU", EXPERTS, "safetensors stacked")
    given = layer_attributes(
        "Clamped_SwiGLU",
        "sigmoid_topk",
        EXPERTS,
        D_MODEL,
        HIDDEN,
        2,
        path,
        False,
        expert_bias=1,
        n_group=2,
        topk_group=1,
        routed_scaling_factor=2.5,
        activation_alpha=1.5,
        swiglu_limit=0.0,
    )
    printed = run(
        """
        made = moe_infer.create_plugin(**json.loads(sys.argv[1]))
        print(made.get_capability_interface(trt.PluginCapabilityType.CORE).plugin_name)
        for wrong in ({"swiglu_limit": -1.0}, {"n_group": 3}, {"swiglu_limit": 7}):
            try:
                moe_infer.create_plugin(**{**json.loads(sys.argv[1]), **wrong})
            except ValueError as error:
                print(error)
        """,
        json.dumps(given),
    )
    name, *errors = printed.splitlines()
    assert name == "MoELayer"
    assert "'swiglu_limit' must be at least 0, got -1" in errors[0]
    assert "'n_group' is 3, which does not divide the 4 experts" in errors[1]
    assert "'swiglu_limit' must be" in errors[2]


@pytest.fixture
def attributes(weights: Path) -> dict[str, Any]:
    return layer_attributes("T5_FF", "default", EXPERTS, D_MODEL, HIDDEN, 1, weights, True)


def compiler() -> str:
    found = shutil.which("g++") or shutil.which("c++")
    if found is None:
        pytest.skip("no C++ compiler (apt-get install g++)")
    return found


def tensorrt_library() -> str:
    path = run("print(plugin.tensorrt_in_process())").strip()
    assert path.startswith("/")
    return path


def test_creators_and_fields_are_those_of_the_operator() -> None:
    printed = run(
        """
        creators = [registry.get_creator(name, "1", "") for name in ("MoELayer", "MoELayerPlugin")]
        print(json.dumps([[[f.name, f.type.name] for f in c.field_names] for c in creators]))
        """
    )
    kinds = {"int": "INT32", "float": "FLOAT32", "floats": "FLOAT32", "string": "CHAR"}
    expected = [[a.name, kinds[a.kind]] for a in ATTRIBUTES]
    assert json.loads(printed) == [expected, expected]


def test_registering_twice_is_harmless() -> None:
    printed = run(
        """
        assert library.moe_infer_register() == 0 and library.moe_infer_register() == 0
        print(sorted(c.name for c in registry.all_creators if c.name.startswith("MoE")))
        """
    )
    assert printed.strip() == "['MoELayer', 'MoELayerPlugin']"


def test_tensorrt_loads_the_library_itself() -> None:
    printed = run(
        """
        import ctypes
        from conftest import why_no_tensorrt
        assert not why_no_tensorrt()
        import sys
        trt = sys.modules["tensorrt"]
        registry = trt.get_plugin_registry()
        assert registry.load_library(sys.argv[1]) is not None
        print(sorted(c.name for c in registry.all_creators if c.name.startswith("MoE")))
        """,
        str(plugin.find_library()),
        prefix="",
    )
    assert printed.strip() == "['MoELayer', 'MoELayerPlugin']"


def test_create_plugin(attributes: dict[str, Any]) -> None:
    printed = run(
        """
        made = moe_infer.create_plugin(**json.loads(sys.argv[1]))
        core = made.get_capability_interface(trt.PluginCapabilityType.CORE)
        build = made.get_capability_interface(trt.PluginCapabilityType.BUILD)
        print(core.plugin_name, core.plugin_version, build.num_outputs)
        """,
        json.dumps(attributes),
    )
    assert printed.strip() == "MoELayer 1 1"  # cloning: tests/native/tensorrt_probe.cpp


def test_as_tensorrt_calls_it(weights: Path, tmp_path: Path) -> None:
    """Types, formats, shapes, configuration, serialisation, cloning: the C++ interface."""
    program = tmp_path / "probe"
    headers = ROOT / ".tensorrt/include"
    cuda = ROOT / ".cuda/nvidia/cu13/include"
    for folder in (headers / "NvInfer.h", cuda / "cuda_runtime_api.h"):
        if not folder.is_file():
            pytest.skip(f"no {folder.relative_to(ROOT)} (make build)")
    subprocess.run(
        [
            compiler(),
            "-std=c++17",
            f"-isystem{headers}",
            f"-isystem{cuda}",
            str(ROOT / "tests/native/tensorrt_probe.cpp"),
            "-ldl",
            "-o",
            str(program),
        ],
        check=True,
    )
    done = subprocess.run(
        [str(program), tensorrt_library(), str(plugin.find_library()), str(weights)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-3000:]}"
    assert done.stdout.strip() == "all right"


BAD = [
    ({"max_concurrency": 0}, "ValueError", "'max_concurrency' must be at least 1, got 0"),
    ({"expert_count": 0}, "ValueError", "'expert_count' must be 1 to 1024, got 0"),
    ({"expert_count": 3}, "ValueError", "'expert_centroids' has 32 values, which is no multiple"),
    ({"expert_sublayer_type": "GLU"}, "ValueError", "'expert_sublayer_type' is 'GLU'; known are"),
    ({"moe_variant": "random"}, "ValueError", "'moe_variant' is 'random'; known are"),
    ({"top_k": 2}, "ValueError", "takes one expert a token, but attribute 'top_k' is 2"),
    ({"expert_weight_file": "gone.npz"}, "WeightFileError", "weight file 'gone.npz' not found"),
    ({"hidden_size": HIDDEN + 1}, "WeightFileError", "shape"),
    ({"expert_weight_digest": "0-1"}, "WeightFileError", "'expert_weight_digest' is '0-1'"),
    ({"experts": 4}, "ValueError", "unknown attribute 'experts'"),
]


@pytest.mark.parametrize(("change", "kind", "sentence"), BAD, ids=[str(b[0]) for b in BAD])
def test_a_bad_attribute_gets_its_message(
    attributes: dict[str, Any], change: dict[str, Any], kind: str, sentence: str
) -> None:
    """Through create_plugin, and in the registry itself, where TensorRT would meet it."""
    printed = run(
        """
        from moe_infer.runtime import tensorrt_api
        bad, good = json.loads(sys.argv[1]), json.loads(sys.argv[2])
        try:
            moe_infer.create_plugin(**bad)
        except Exception as error:
            print(type(error).__name__, error, sep="|")
        fields, memory = tensorrt_api._fields(trt, bad)
        creator = registry.get_creator("MoELayer", "1", "")
        made = creator.create_plugin("bad", fields, trt.TensorRTPhase.BUILD)
        print(made, library.moe_infer_last_error().decode(), sep="|")
        moe_infer.create_plugin(**good)
        print("alive")
        """,
        json.dumps({**attributes, **change}),
        json.dumps(attributes),
    )
    raised, native, alive = printed.splitlines()
    assert raised.startswith(f"{kind}|") and sentence in raised
    assert native.startswith("None|") and sentence in native
    assert alive == "alive"


FIELDS = [
    ("int16 int", "expert_count", "np.array([4], np.int16)", "INT16", "1 of type INT16"),
    ("two ints", "expert_count", "np.array([4, 4], np.int32)", "INT32", "2 of type INT32"),
    ("int floats", "expert_centroids", "np.zeros(32, np.int32)", "INT32", "32 of type INT32"),
    ("int float", "swiglu_limit", "np.array([7], np.int32)", "INT32", "1 of type INT32"),
    ("two floats", "swiglu_limit", "np.zeros(2, np.float32)", "FLOAT32", "1 of type FLOAT32 or"),
    ("float text", "moe_variant", "np.zeros(2, np.float32)", "FLOAT32", "2 of type FLOAT32"),
    (
        "wide int",
        "expert_count",
        "np.array([2**40])",
        "INT64",
        "must fit 32 bits, got 1099511627776",
    ),
]


@pytest.mark.parametrize(
    ("name", "data", "kind", "sentence"), [f[1:] for f in FIELDS], ids=[f[0] for f in FIELDS]
)
def test_a_field_of_the_wrong_type_says_both(
    name: str, data: str, kind: str, sentence: str
) -> None:
    printed = run(
        f"""
        import numpy as np
        data = {data}
        field = trt.PluginField({name!r}, data, trt.PluginFieldType.{kind})
        fields = trt.PluginFieldCollection([field])
        creator = registry.get_creator("MoELayer", "1", "")
        print(creator.create_plugin("bad", fields, trt.TensorRTPhase.BUILD))
        print(library.moe_infer_last_error().decode())
        """
    )
    made, message = printed.splitlines()
    assert made == "None"
    assert f"'{name}'" in message and sentence in message


def fake_tensorrt(folder: Path, soname: str, version: int) -> Path:
    source = folder / "fake.cpp"
    source.write_text(
        f'extern "C" int getInferLibVersion() {{ return {version}; }}\n'
        'extern "C" void* getPluginRegistry() { __builtin_trap(); }\n'
    )
    path = folder / soname
    call = [compiler(), "-shared", "-fPIC", f"-Wl,-soname,{soname}", str(source), "-o", str(path)]
    subprocess.run(call, check=True)
    return path


@pytest.mark.parametrize(
    ("soname", "version", "text"),
    [("libnvinfer.so.8", 8601, "8.6.1"), ("libnvinfer.so.99", 990203, "99.2.3")],
)
def test_tensorrt_of_another_major_version(
    tmp_path: Path, soname: str, version: int, text: str
) -> None:
    """Registers nothing there (the fake registry traps); names versions, paths and the fix."""
    fake = fake_tensorrt(tmp_path, soname, version)
    printed = run(
        """
        import ctypes, sys
        ctypes.CDLL(sys.argv[1])
        library = ctypes.CDLL(sys.argv[2])
        library.moe_infer_last_error.restype = ctypes.c_char_p
        library.moe_infer_tensorrt_headers_version.restype = ctypes.c_char_p
        print(library.moe_infer_register())
        print(library.moe_infer_last_error().decode())
        print(library.moe_infer_tensorrt_headers_version().decode())
        try:
            import moe_infer
        except Exception as error:
            print(type(error).__name__, error)
        """,
        str(fake),
        str(plugin.find_library()),
        prefix="",
    )
    status, message, headers, raised = printed.splitlines()
    assert status == "1"  # MOE_INFER_INVALID
    for part in (text, str(fake), headers, str(plugin.find_library()), "--tensorrt-prefix"):
        assert part in message
    assert raised.startswith("PluginError") and text in raised and str(fake) in raised


def test_without_tensorrt_it_says_so() -> None:
    printed = run(
        """
        import ctypes, sys
        library = ctypes.CDLL(sys.argv[1])
        library.moe_infer_last_error.restype = ctypes.c_char_p
        print(library.moe_infer_register(), library.moe_infer_last_error().decode())
        """,
        str(plugin.find_library()),
        prefix="",
    )
    assert printed.startswith("1 moe_infer: no TensorRT is loaded in this process;")
