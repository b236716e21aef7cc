"""Packages moe_infer and, where the tools for it are there, compiles ops/ into libmoe_infer.so.

`python setup.py build_ext --tensorrt-prefix=DIR --cuda-prefix=DIR` compiles into build/ and fails
if something is missing. `pip install .` compiles too if everything is there; if not, it installs
the Python part, says what was missing, and leaves that as moe_infer/build_record.json, from which
`moe_infer.runtime.plugin.status` tells it. MOE_INFER_BUILD=0 keeps pip from compiling,
MOE_INFER_BUILD=1 makes a missing tool an error.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import setuptools
from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:  # the first that reads our pyproject.toml
    sys.exit(f"setuptools {setuptools.__version__} is too old: pip install 'setuptools>=77'")

from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build"
LIBRARY = "libmoe_infer.so"
RECORD = "build_record.json"
# What the last `setup.py build_ext` was given, so that a `pip install .` after it packages the same
# library.
REMEMBERED = BUILD / "prefixes.json"

# Option, its default, help.
OPTIONS = (
    ("tensorrt-prefix", ".tensorrt", "folder with TensorRT's include/ (tools/get_tensorrt.py)"),
    (
        "cuda-prefix",
        ".cuda/nvidia/cu13",
        "folder with bin/nvcc and include/ (tools/get_compiler.py)",
    ),
    ("cudnn-prefix", "", "accepted for build scripts of InfMoE, unused: cuDNN is no longer needed"),
    ("cutlass-prefix", ".cuda/cutlass_library/source", "folder with include/cutlass"),
    ("deps-prefix", ".deps", "folder with zlib/ and simdjson/ (tools/get_deps.py)"),
    ("gpu-archs", "80,90a,ptx90", "N: machine code for sm_N; ptxN: PTX of compute_N"),
)


def meson_command() -> list[str] | None:
    """How to call meson: this Python's module, else the program; None if there is neither."""
    if importlib.util.find_spec("mesonbuild") is not None:
        return [sys.executable, "-m", "mesonbuild.mesonmain"]
    found = shutil.which("meson")
    return [found] if found else None


def ninja_command() -> str | None:
    """Path of ninja: that of the Python package, else the one in PATH; None if there is neither."""
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    return shutil.which("ninja")


def what_is_missing(options: dict[str, str]) -> list[str]:
    """What the build needs and does not find, a phrase each with its remedy."""
    missing = []
    for program, command in (("meson", meson_command()), ("ninja", ninja_command())):
        if command is None:
            missing.append(f"no {program} (pip install {program})")
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        missing.append("no C++ compiler (apt-get install g++)")
    for option, file, remedy in (
        ("cuda-prefix", "bin/nvcc", "python tools/get_compiler.py"),
        ("cutlass-prefix", "include/cutlass/cutlass.h", "python tools/get_compiler.py"),
    ):
        if not (ROOT / options[option] / file).is_file():
            missing.append(f"no {file} under --{option}={options[option]} ({remedy})")
    include = ROOT / options["tensorrt-prefix"] / "include"
    if not any(
        (include / part / "NvInfer.h").is_file()
        for part in ("", "x86_64-linux-gnu", "aarch64-linux-gnu")
    ):
        missing.append(
            f"no include/NvInfer.h under --tensorrt-prefix={options['tensorrt-prefix']} "
            "(python tools/get_tensorrt.py)"
        )
    # zlib and simdjson may be the system's; meson looks for them and says what to do.
    return missing


def compile_library(options: dict[str, str], jobs: int | None) -> None:
    """Runs meson and ninja in build/."""
    meson, ninja = meson_command(), ninja_command()
    assert meson
    assert ninja
    environment = {
        **os.environ,
        "NINJA": ninja,
    }  # the same one for meson, which looks only into PATH
    arguments = [f"-D{name}={options[name]}" for name, _, _ in OPTIONS]
    # --reconfigure: finds files that were added to ops/ since.
    setup_call = [*meson, "setup", "--reconfigure", str(BUILD), str(ROOT), *arguments]
    ninja_call = [ninja, "-C", str(BUILD), *([f"-j{jobs}"] if jobs else [])]
    for call in (setup_call, ninja_call):
        if subprocess.run(call, env=environment).returncode != 0:
            sys.exit(
                f"compiling {LIBRARY} failed at: {' '.join(call)} (see above); "
                "MOE_INFER_BUILD=0 installs the Python part alone"
            )
    REMEMBERED.write_text(json.dumps(options, indent=1) + "\n")


class BuildLibrary(build_ext):
    """build_ext whose only extension is the library; see the module's docstring."""

    user_options: ClassVar = [
        *build_ext.user_options,
        *((f"{name}=", None, help_text) for name, _, help_text in OPTIONS),
    ]

    def initialize_options(self) -> None:
        super().initialize_options()
        for name, _, _ in OPTIONS:
            setattr(self, name.replace("-", "_"), None)

    def chosen_options(self) -> dict[str, str]:
        given = {name: getattr(self, name.replace("-", "_")) for name, _, _ in OPTIONS}
        remembered = json.loads(REMEMBERED.read_text()) if REMEMBERED.is_file() else {}
        chosen = {}
        for name, default, _ in OPTIONS:
            if given[name] is None:
                # Asked for by name, build_ext takes the defaults: the command line says it all.
                chosen[name] = default if self.asked_for() else remembered.get(name, default)
            else:
                chosen[name] = given[name]
                if name.endswith("prefix") and given[name]:
                    chosen[name] = str(Path(given[name]).expanduser().resolve())
        return chosen

    def asked_for(self) -> bool:
        return "build_ext" in self.distribution.commands

    def run(self) -> None:
        options = self.chosen_options()
        policy = os.environ.get("MOE_INFER_BUILD", "auto")
        required = self.asked_for() or policy == "1"
        missing = what_is_missing(options)
        if not required and policy == "0":
            missing = ["MOE_INFER_BUILD=0 was set"]
        if missing and required:
            sys.exit(
                "libmoe_infer.so cannot be built:\n"
                + "".join(f"  - {entry}\n" for entry in missing)
            )
        if missing:
            print(
                "moe-infer: the TensorRT plugin is not built, the Python part is. Missing:",
                file=sys.stderr,
            )
            for entry in missing:
                print(f"  - {entry}", file=sys.stderr)
        else:
            jobs = int(self.parallel) if self.parallel else None
            compile_library(options, jobs)
        if not self.asked_for() and not self.inplace and not getattr(self, "editable_mode", False):
            self.put_beside_package(missing)

    def put_beside_package(self, missing: list[str]) -> None:
        """Puts the library, or why there is none, beside the package that is being installed."""
        package = Path(self.build_lib) / "moe_infer"
        package.mkdir(parents=True, exist_ok=True)
        (package / LIBRARY).unlink(missing_ok=True)  # of an earlier build
        (package / RECORD).write_text(
            json.dumps({"built": not missing, "missing": missing}, indent=1) + "\n"
        )
        if not missing:
            shutil.copy2(BUILD / LIBRARY, package / LIBRARY)

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "moe_infer"
        return [str(package / name) for name in (LIBRARY, RECORD) if (package / name).is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []

    def copy_extensions_to_source(self) -> None:
        """Nothing: a source tree finds the library in build/."""


class Wheel(bdist_wheel):
    """The library is called through ctypes, so any Python 3; without it, any platform."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        built = (
            (Path(self.bdist_dir) / "moe_infer" / LIBRARY).is_file() if self.bdist_dir else False
        )
        return "py3", "none", platform if built else "any"


class WithLibrary(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    ext_modules=[Extension("moe_infer.libmoe_infer", sources=[])],
    distclass=WithLibrary,
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
