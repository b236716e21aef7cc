"""Builds programs of tests/native with sanitizers, and talks to read_weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from shared_files import alone

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
OURS = [
    *(f"ops/core/{name}.cpp" for name in (
        "weight_file", "file_index", "safetensors_file", "zip_index", "npy_header", "npz_file",
        "host_memory", "parallel", "content_check", "expert_source", "expert_names", "expert_store",
    )),
    "ops/sublayers/registry.cpp",
    "ops/sublayers/slot_layout.cpp",
    "tests/native/sub_layers.cpp",
]  # fmt: skip
"""What reads weights; ours, so all warnings count."""
ZLIB = [
    f".deps/zlib/{name}.c"
    for name in ("adler32", "crc32", "inffast", "inflate", "inftrees", "zutil")
]
SIMDJSON = ".deps/simdjson/simdjson.cpp"
CUDA = ".cuda/nvidia/cu13"
INCLUDES = ["-Iops", "-Iops/include", "-isystem", f"{CUDA}/include"]
INCLUDES += ["-isystem", ".deps/simdjson", "-isystem", ".deps/zlib"]
OBJECTS = ROOT / "build/sanitized"
"""Of all programs."""


def why_not() -> str:
    """What is missing for the build, "" if nothing."""
    for program in ("gcc", "g++"):
        if shutil.which(program) is None:
            return f"no {program}"
    for path in (SIMDJSON, ZLIB[0], f"{CUDA}/lib/libcudart_static.a"):
        if not (ROOT / path).is_file():
            return f"{path} is missing (make build brings it)"
    return ""


def build(folder: Path) -> Path:
    """The program that answers questions about weight files."""
    libraries = [f"{CUDA}/lib/libcudart_static.a", "-lpthread", "-ldl", "-lrt"]
    return build_program(folder, [*OURS, "tests/native/read_weights.cpp"], libraries)


def build_program(folder: Path, ours: list[str], libraries: list[str]) -> Path:
    """Links a program in ``folder``; the programs beside it share their objects."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / folder.name
    with alone(OBJECTS):
        objects = _compile(ours)
        made = program.with_suffix(".new")  # another worker may be running the old one
        _run(["g++", *SANITIZERS, *map(str, objects), *libraries, "-o", str(made)])
        made.replace(program)
    return program


def _compile(ours: list[str]) -> list[Path]:
    """The objects of a program; those that are newer than their source stay as they are."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    headers = [*ROOT.glob("ops/**/*.h"), *ROOT.glob("tests/native/*.h")]
    objects = []
    for source in [*ZLIB, SIMDJSON, *ours]:
        mine = source in ours
        made = OBJECTS / (source.replace("/", "_") + ".o")
        objects.append(made)
        inputs = [ROOT / source, *(headers if mine else [])]
        if made.is_file() and all(made.stat().st_mtime > p.stat().st_mtime for p in inputs):
            continue
        language = ["gcc"] if source.endswith(".c") else ["g++", "-std=c++17"]
        # Not ours, and slow to build with sanitizers: only memory that we hand over is of interest.
        flags = [*SANITIZERS, "-Wall", "-Wextra", "-Werror"] if mine else ["-w", "-DHAVE_UNISTD_H"]
        # Lines are all that the sanitizers' reports need of -g.
        _run([*language, "-g1", "-O1", *flags, *INCLUDES, "-c", source, "-o", str(made)])
    return objects


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


class WeightReader:
    """One running program; it must outlive every file that it is given."""

    def __init__(self, program: Path, environment: dict[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
        )

    def ask(self, *words: object) -> dict[str, Any] | str:
        """The answer, or the text of an error about the file."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write((" ".join(map(str, words)) + "\n").encode())
            self._process.stdin.flush()
            line = self._process.stdout.readline().decode(errors="replace")
        except BrokenPipeError:
            line = ""
        if not line:
            raise AssertionError(f"the program died on {words}:\n{self.finish()[-6000:]}")
        if line.startswith("ok "):
            return json.loads(line[3:])
        prefix = "error 2 "  # MOE_INFER_FILE
        assert line.startswith(prefix), line
        return line.removeprefix(prefix).rstrip("\n")

    def finish(self) -> str:
        """Ends the program; what the sanitizers wrote, leaks included."""
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._process.stdin.close()
        errors = self._process.stderr.read().decode(errors="replace")
        self._process.stdout.close()
        self._process.stderr.close()
        if self._process.wait() != 0 and not errors:
            errors = f"exit code {self._process.returncode}"
        return errors
