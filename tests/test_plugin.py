"""Finding, loading and registering libmoe_infer.so; each case in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = "from moe_infer.runtime import plugin\n"


def run_python(code: str, *paths: Path, **environment: str) -> str:
    """Output of Python code in a fresh process; its errors count as output."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={
            **{name: value for name, value in os.environ.items() if name != "MOE_INFER_LIBRARY"},
            "PYTHONPATH": os.pathsep.join(str(path) for path in (ROOT, *paths)),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def make_library(path: Path, source: str) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler (apt-get install gcc)")
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", path, f"-Wl,-soname,{path.name}"],
        input=source,
        text=True,
        check=True,
    )
    return path


def test_import_is_silent():
    assert run_python("import moe_infer") == ""


def test_library_that_is_named_but_missing(tmp_path):
    missing = tmp_path / "no.so"
    output = run_python(PLUGIN + "print(plugin.status())", MOE_INFER_LIBRARY=str(missing))
    assert "usable=False" in output
    assert f"MOE_INFER_LIBRARY is '{missing}', which is not a file" in output


def test_empty_library_variable_switches_the_plugin_off():
    output = run_python(PLUGIN + "print(plugin.status().reason)", MOE_INFER_LIBRARY="")
    assert output.strip() == "the plugin is switched off: MOE_INFER_LIBRARY is the empty string"


@pytest.mark.parametrize("content", ["not an ELF file", "other library"])
def test_file_that_is_not_the_library(tmp_path, content):
    path = tmp_path / "libmoe_infer.so"
    if content == "other library":
        make_library(path, "int other(void) { return 1; }")
    else:
        path.write_text(content)
    output = run_python(
        PLUGIN + "import moe_infer\nprint(plugin.status().reason)\n"
        "try: plugin.load()\nexcept moe_infer.PluginError as error: print('raised', error)",
        MOE_INFER_LIBRARY=str(path),
    )
    reason, raised = output.splitlines()
    assert reason.startswith(f"{path} cannot be used (")
    assert raised == f"raised {reason}"


def test_recorded_reason_is_told(tmp_path):
    """A package that was installed without the plugin says what was missing then."""
    shutil.copytree(
        ROOT / "moe_infer", tmp_path / "moe_infer", ignore=shutil.ignore_patterns("*.so")
    )
    (tmp_path / "moe_infer/build_record.json").write_text('{"missing": ["no g++ here"]}')
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + PLUGIN
    output = run_python(code + "print(plugin.status().reason)")
    assert "installed without the plugin (no g++ here)" in output


def test_pip_libraries_are_preloaded_in_order(tmp_path):
    """Layout of the pip packages; each fake library appends its name when it is loaded."""
    template = """
#include <stdio.h>
__attribute__((constructor)) static void loaded(void) {{ puts("{0}"); fflush(stdout); }}
int getInferLibVersion(void) {{ return 101601; }}
"""
    for name in (
        "nvidia/cu13/lib/libcublas.so.13",
        "nvidia/cu13/lib/libcublasLt.so.13",
        "nvidia/cu13/lib/libcudart.so.13",
        "nvidia/cudnn/lib/libcudnn.so.9",
        "tensorrt_libs/libnvinfer_plugin.so.10",
        "tensorrt_libs/libnvinfer.so.10",
    ):
        make_library(tmp_path / name, template.format(Path(name).name))
    (tmp_path / "tensorrt_libs/__init__.py").write_text("raise RuntimeError('imported')")
    output = run_python(
        # Other installed CUDA packages must not stand in for the fake ones.
        "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]\n"
        + "import importlib.util, types\n"
        + "sys.modules['moe_infer'] = package = types.ModuleType('moe_infer')\n"
        + f"package.__path__ = [{str(ROOT / 'moe_infer')!r}]\n"
        + PLUGIN
        + "plugin.has_driver = lambda: True\nplugin.preload()\nplugin.preload()\n"
        + "found = plugin.tensorrt_in_process()\n"
        + "print(found, plugin._tensorrt_version(found))",
        tmp_path,
        MOE_INFER_LIBRARY="",
    )
    assert output.splitlines() == [
        "libcudart.so.13",
        "libcublasLt.so.13",
        "libcublas.so.13",
        "libcudnn.so.9",
        "libnvinfer.so.10",
        "libnvinfer_plugin.so.10",
        f"{tmp_path}/tensorrt_libs/libnvinfer.so.10 10.16.1",
    ]


@pytest.mark.needs_library
def test_tensorrt_of_another_major_version(tmp_path):
    other = make_library(
        tmp_path / "libnvinfer.so.11",
        "int getInferLibVersion(void) { return 110400; }"
        "void* getPluginRegistry(void) { return 0; }",
    )
    output = run_python(
        f"import ctypes; ctypes.CDLL({str(other)!r})\n"
        "try: import moe_infer\n"
        "except RuntimeError as error: print(type(error).__name__, error)\n"
        + PLUGIN
        # Not the import's process state: status itself must tell, and not raise.
        + "print(plugin.status())"
    )
    first, status = output.splitlines()
    library = run_python(
        PLUGIN + "print(plugin.find_library(), plugin.status().headers_version)"
    ).split()
    assert first.startswith("PluginError ")
    for text in (str(other), "11.4", *library):
        assert text in first
    assert "usable=False" in status
    assert "tensorrt_version='11.4.0'" in status


@pytest.mark.needs_library
@pytest.mark.needs_tensorrt
def test_registers_once_with_the_tensorrt_in_the_process():
    names = ("libnvinfer.so.10", "libnvinfer_plugin.so.10", "libnvonnxparser.so.10")
    libraries = [str(ROOT / ".tensorrt/lib" / name) for name in names]
    output = run_python(
        f"import ctypes\nfor path in {libraries}: ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)\n"
        "import tensorrt_bindings as trt\n" + PLUGIN + "plugin.load()\nplugin.load()\n"
        "names = [c.name for c in trt.get_plugin_registry().all_creators]\n"
        "print(sorted(n for n in names if n.startswith('MoE')))\n"
        "print(plugin.status().tensorrt_version)"
    )
    assert output.splitlines()[-2:] == ["['MoELayer', 'MoELayerPlugin']", "10.6.0"]
