"""Brings what the plugin is compiled from and compiles it into build/libmoe_infer.so.

With --if-possible a machine that lacks a tool for it (g++, cargo, mvn) is no error: the reason goes
to build/not_built.txt, which the tests show for what they skip.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys

import registries

ROOT = registries.ROOT
NOT_BUILT = ROOT / "build/not_built.txt"
GET = {
    "headers": ["get_tensorrt.py", "--no-libraries"],
    "libraries": ["get_tensorrt.py"],
    "headers of TensorRT 11": [
        "get_tensorrt.py", "--no-libraries", "--headers", "11.4", "--prefix", ".tensorrt/11.4",
    ],
    "sources": ["get_deps.py"],
    "compiler": ["get_compiler.py"],
}  # fmt: skip


def body() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--if-possible", action="store_true")
    parser.add_argument("--with-libraries", action="store_true", help="TensorRT's too, for tests")
    parser.add_argument(
        "--gpu-archs", default=os.environ.get("MOE_INFER_GPU_ARCHS") or "80,90a,ptx90"
    )
    options = parser.parse_args()
    NOT_BUILT.parent.mkdir(exist_ok=True)
    NOT_BUILT.unlink(missing_ok=True)
    try:
        build(options.gpu_archs)
    except registries.ToolError as error:
        if not options.if_possible:
            raise
        NOT_BUILT.write_text(f"{error}\n")
        registries.say(f"the plugin is not built, its tests will be skipped: {error}")
    if options.with_libraries:
        try:
            get("headers of TensorRT 11")
            get("libraries")
        except registries.ToolError as error:
            if not options.if_possible:
                raise
            registries.say(f"without TensorRT's libraries, their tests will be skipped: {error}")


def build(gpu_archs: str) -> None:
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        raise registries.ToolError("no C++ compiler is installed; apt-get install g++")
    for what in ("headers", "sources", "compiler"):
        get(what)
    call = [sys.executable, "setup.py", "build_ext", f"--gpu-archs={gpu_archs}"]
    if subprocess.run(call, cwd=ROOT).returncode != 0:
        # Not the machine's fault: an error in any case.
        sys.exit("[build_native] compiling the plugin failed, see above")


def get(what: str) -> None:
    script, *arguments = GET[what]
    call = [sys.executable, str(ROOT / "tools" / script), *arguments]
    done = subprocess.run(call, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise registries.ToolError(done.stderr.strip() or f"{' '.join(call)} failed")


if __name__ == "__main__":
    registries.main(body)
