"""The package as pip sees it: installs anywhere, its extras, its public names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("moe_infer", "ops", "setup.py", "pyproject.toml", "VERSION", "README.md", "LICENSE")
MESON = ("meson.build", "meson.options")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The sources as a fresh clone has them: without .cuda, .tensorrt, .deps and build."""
    folder = tmp_path_factory.mktemp("tree")
    for name in (*SOURCES, *MESON):
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "build_record.json")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    """Built by pip, offline, with no compiler and no CUDA within reach."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-v"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "-w", folder, tree],
        env={**os.environ, "PATH": str(Path(sys.executable).parent), "CXX": "none"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "the TensorRT plugin is not built, the Python part is" in done.stdout
    assert "no C++ compiler" in done.stdout
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Python of a fresh virtual environment that has the wheel and nothing else."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin/python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site]
    subprocess.run([*install, wheel], check=True, capture_output=True)
    return python


def test_wheel_without_a_compiler(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        record = json.loads(archive.read("moe_infer/build_record.json"))
    assert "moe_infer/op/sublayers.py" in names
    assert "moe_infer/py.typed" in names
    assert not [name for name in names if name.endswith(".so")]
    assert record["built"] is False
    missing = "\n".join(record["missing"])
    for what in ("no C++ compiler", "bin/nvcc", "cutlass.h", "NvInfer.h"):
        assert what in missing


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        path = next(name for name in archive.namelist() if name.endswith("METADATA"))
        metadata = message_from_string(archive.read(path).decode())
    assert metadata["Version"] == (ROOT / "VERSION").read_text().strip()
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra")) == {"cpu", "gpu", "torch", "plot", "test", "dev"}
    requirements = metadata.get_all("Requires-Dist")
    hard = {line.split(">")[0].strip() for line in requirements if "extra ==" not in line}
    # Neither ONNX Runtime: their wheels exclude each other.
    assert hard == {"numpy", "onnx", "ml_dtypes", "rich"}

    def of_extra(name: str) -> str:
        return " ".join(line for line in requirements if f'extra == "{name}"' in line)

    assert "onnxruntime>=" in of_extra("cpu")
    assert "onnxruntime-gpu" in of_extra("gpu")
    assert "tensorrt-cu13" in of_extra("gpu")
    assert "onnxruntime" not in of_extra("torch")


def test_import_without_onnxruntime_names_the_extras(installed):
    done = subprocess.run([installed, "-c", "import moe_infer"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "ImportError: moe_infer needs ONNX Runtime" in done.stderr
    assert "moe-infer[cpu]" in done.stderr
    assert "moe-infer[gpu]" in done.stderr


def test_installed_package_says_why_there_is_no_plugin(installed):
    """With ONNX Runtime and the other dependencies from this environment."""
    site = os.pathsep.join(path for path in sys.path if "site-packages" in path)
    done = subprocess.run(
        [installed, "-c", "import moe_infer; from moe_infer.runtime import plugin;"
         "print(moe_infer.__file__); print(plugin.status().reason)"],
        env={**os.environ, "PYTHONPATH": site}, capture_output=True, text=True, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(ROOT) not in done.stdout
    assert "installed without the plugin (" in done.stdout
    assert "no C++ compiler" in done.stdout


PUBLIC = {
    "InferenceSession",
    "LayerConfig",
    "PluginError",
    "WeightFileError",
    "__version__",
    "count_expert_use",
    "create_plugin",
    "expert_stats",
    "inspect_model",
    "lower",
    "plugin_status",
    "rewrite",
    "set_fetch_ahead",
    "set_gpu_budget",
    "verify",
}


def test_public_names_are_exactly_these():
    """In a fresh process: which submodules are loaded depends on what ran before."""
    code = """
import types, moe_infer
public = [n for n, v in vars(moe_infer).items() if n[0] != "_" and type(v) is not types.ModuleType]
print(*moe_infer.__all__)
print(*{*public} - {"annotations", "TYPE_CHECKING", "Any"})
for name in moe_infer.__all__:
    assert getattr(moe_infer, name) is not None
    assert name in dir(moe_infer)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    declared, visible = (line.split() for line in done.stdout.splitlines())
    assert sorted(declared) == sorted(PUBLIC)
    assert set(visible) <= PUBLIC


def test_version_is_that_of_the_package():
    import moe_infer

    assert moe_infer.__version__ == (ROOT / "VERSION").read_text().strip()


def test_command_line_is_installed():
    from importlib.metadata import entry_points

    import moe_infer.cli

    script = next(iter(entry_points(group="console_scripts", name="moe-infer")), None)
    assert script is not None, "moe-infer is not installed (make test)"
    assert script.load() is moe_infer.cli.main
