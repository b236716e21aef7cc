"""Brings nvcc 13.0, CUB and the CUTLASS headers from PyPI into .cuda/."""

from __future__ import annotations

import argparse
from pathlib import Path

import registries

PACKAGES = (
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
    "nvidia-cutlass==4.2.0.0",
)
CUTLASS = "cutlass_library/source/include/cutlass/cutlass.h"


def body() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefix", type=Path, default=registries.ROOT / ".cuda")
    prefix = parser.parse_args().prefix.resolve()
    wanted = [prefix / "nvidia/cu13/bin/nvcc", prefix / CUTLASS]
    if all(path.is_file() for path in wanted):
        registries.say(f"already in {prefix}")
        return
    registries.pip_target(PACKAGES, prefix)
    for path in wanted:
        if not path.is_file():
            raise registries.ToolError(f"{path} is not in the packages: has their layout changed?")
        if "bin" in path.parts:
            path.chmod(0o755)


if __name__ == "__main__":
    registries.main(body)
