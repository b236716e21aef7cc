"""The compiled library: what it shows, what it links, which headers it compiles with."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_infer.runtime import plugin

ROOT = Path(__file__).resolve().parent.parent
ADAPTER = sorted((ROOT / "ops/tensorrt").glob("*.cpp"))


def tool_output(*command: str | Path) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"no {command[0]} (apt-get install binutils)")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def library() -> Path:
    path = plugin.find_library()
    assert path is not None
    return path


@pytest.mark.needs_library
def test_shows_only_its_entries(library):
    lines = tool_output("nm", "-D", "--defined-only", library).splitlines()
    names = {line.split()[-1].split("@")[0] for line in lines}
    surplus = {name for name in names if not name.startswith("moe_infer_")}
    assert surplus <= {"getCreators", "setLoggerFinder"}
    header = (ROOT / "ops/include/moe_infer.h").read_text()
    for name in names - surplus:
        assert f"{name}(" in header
    assert "moe_infer_register" in names


@pytest.mark.needs_library
def test_links_neither_tensorrt_nor_cuda(library):
    dynamic = tool_output("readelf", "-d", library)
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "NEEDED" in line}
    assert needed
    everywhere = {"c", "m", "stdc++", "gcc_s", "pthread", "dl", "rt"}
    for name in needed:
        assert name.startswith("ld-linux") or name.split(".so")[0].removeprefix("lib") in everywhere
    assert "RUNPATH" not in dynamic
    assert "TEXTREL" not in dynamic


@pytest.mark.needs_library
def test_headers_version(library):
    headers = (ROOT / ".tensorrt/include/NvInferVersion.h").read_text()
    status = plugin.status()
    assert status.library == library
    major, minor = status.headers_version.split(".")[:2]
    assert f"#define TRT_MAJOR_ENTERPRISE {major}\n" in headers
    assert f"#define TRT_MINOR_ENTERPRISE {minor}\n" in headers


@pytest.mark.needs_library
@pytest.mark.parametrize("source", ADAPTER, ids=lambda path: path.name)
def test_adapter_compiles_with_the_headers_of_tensorrt_11(source):
    """Without a warning."""
    include = ROOT / ".tensorrt/11.4/include"
    if not include.is_dir():
        pytest.skip("there are no headers of TensorRT 11.4 in .tensorrt/11.4 (make test)")
    system = [include, ROOT / ".cuda/nvidia/cu13/include", ROOT / ".deps/simdjson"]
    done = subprocess.run(
        [
            "c++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror",
            "-DMOE_INFER_WITH_TENSORRT=1", '-DMOE_INFER_VERSION="0"',
            f"-I{ROOT}/ops", f"-I{ROOT}/ops/include",
            *(f"-isystem{path}" for path in system), source,
        ],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.needs_library
def test_build_ext_names_what_is_missing(tmp_path):
    call = [sys.executable, "setup.py", "build_ext", f"--cuda-prefix={tmp_path}"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"no bin/nvcc under --cuda-prefix={tmp_path}" in done.stderr


def test_adapter_is_the_only_place_with_tensorrt_headers():
    users = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "ops").rglob("*.*")
        if path.suffix in {".h", ".cpp", ".cu", ".cuh"} and "#include <NvInfer" in path.read_text()
    ]
    assert users
    assert all(user.startswith("ops/tensorrt/") for user in users), users
