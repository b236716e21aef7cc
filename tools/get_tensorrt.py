"""Brings TensorRT without a vendor account: headers and libraries into .tensorrt/{include,lib}.

The headers come from crates.io, the libraries from Maven. Of the releases on Maven only 10.6 holds
the builder for sm_90. Without --builder the libraries can hold plugins and run the registry, on any
machine; with it (1.4 GB more) they build engines, which needs a GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import registries

# Headers: TensorRT version -> crate, its version, folder.
HEADERS = {
    "10.16": ("trtx-sys", "0.5.0", "TensorRT-Headers/TRT-Enterprise-10.16"),
    "11.4": ("trtx-sys", "0.9.1+rtx1.7", "TensorRT-Headers/TRT-Enterprise-11.4"),
}
ARTIFACT = "org.bytedeco:tensorrt:10.6-1.5.11:jar:linux-x86_64-redist"
INSIDE = "org/bytedeco/tensorrt/linux-x86_64"
# The Python bindings link the second and the third.
LIBRARIES = ("libnvinfer.so.10", "libnvinfer_plugin.so.10", "libnvonnxparser.so.10")
BUILDER = "libnvinfer_builder_resource.so.10.6.0"


def body() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prefix", type=Path, default=registries.ROOT / ".tensorrt")
    parser.add_argument("--headers", choices=sorted(HEADERS), default="10.16")
    parser.add_argument("--no-libraries", action="store_true", help="headers alone; needs no mvn")
    parser.add_argument("--builder", action="store_true", help="also what builds engines")
    options = parser.parse_args()
    prefix = options.prefix.resolve()
    get_headers(options.headers, prefix / "include")
    if not options.no_libraries:
        get_libraries([*LIBRARIES, *([BUILDER] if options.builder else [])], prefix / "lib")


def get_headers(version: str, include: Path) -> None:
    header = include / "NvInferVersion.h"
    if not header.is_file():
        registries.write_files(registries.crate_files(*HEADERS[version]), include)
    major, minor = (macro(header, f"TRT_{part}_ENTERPRISE") for part in ("MAJOR", "MINOR"))
    if f"{major}.{minor}" != version:
        raise registries.ToolError(
            f"{include} holds the headers of TensorRT {major}.{minor}, not {version}; "
            "remove the folder or give another --prefix"
        )
    registries.say(f"headers of TensorRT {version} are in {include}")


def macro(header: Path, name: str) -> str:
    for line in header.read_text().splitlines():
        words = line.split()
        if words[:2] == ["#define", name]:
            return words[2]
    return "?"


def get_libraries(names: list[str], lib: Path) -> None:
    missing = [name for name in names if not (lib / name).is_file()]
    if missing:
        registries.maven_files(ARTIFACT, {f"{INSIDE}/{name}": name for name in missing}, lib)
    registries.say(f"{', '.join(names)} are in {lib}")


if __name__ == "__main__":
    registries.main(body)
