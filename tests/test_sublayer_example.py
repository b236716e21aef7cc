"""The whole example of docs/sub-layers.md compiles as it stands, against the library's headers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "sub-layers.md"
CUDA = Path(os.environ.get("MOE_INFER_CUDA_PREFIX", ROOT / ".cuda" / "nvidia" / "cu13"))


def example() -> str:
    """The C++ block after the marker ``<!-- example: FILE -->``."""
    found = re.findall(r"<!-- example: \S+ -->\n```cpp\n(.*?)```", PAGE.read_text(), re.S)
    assert len(found) == 1, f"{PAGE.name} must hold one marked example, found {len(found)}"
    return str(found[0])


def nvcc() -> str:
    """The compiler that tools/get_compiler.py brought, or the one in PATH."""
    brought = CUDA / "bin" / "nvcc"
    found = str(brought) if brought.is_file() else shutil.which("nvcc")
    if found is None:
        pytest.skip("no nvcc: run `python tools/get_compiler.py`")
    return found


def test_example_registers_itself() -> None:
    """The page's promise: one file and one registration line."""
    source = example()
    assert source.count("MOE_REGISTER_SUBLAYER(") == 1
    assert source.rstrip().splitlines()[-1].startswith("}  // namespace")


@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_example_compiles(tmp_path: Path, architecture: str) -> None:
    """Without a warning, for both architectures that the library is built for."""
    source = tmp_path / "squared_relu.cu"
    source.write_text(example())
    system = [CUDA / "include", CUDA / "include" / "cccl"]
    done = subprocess.run(
        [
            nvcc(),
            "-std=c++17",
            "--expt-relaxed-constexpr",
            "-Xcompiler=-fPIC,-Wall,-Wextra,-Werror",
            "-Werror=all-warnings",
            f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
            f"-I{ROOT / 'ops'}",
            f"-I{ROOT / 'ops' / 'include'}",
            *(part for folder in system if folder.is_dir() for part in ("-isystem", str(folder))),
            "-c",
            str(source),
            "-o",
            str(tmp_path / "squared_relu.o"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
