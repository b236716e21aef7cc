"""Brings the sources of zlib and simdjson, which are compiled into the library, into .deps/."""

from __future__ import annotations

import argparse
from pathlib import Path

import registries

ZLIB = ("libz-sys", "1.1.31", "src/zlib")
SIMDJSON = ("simdjson-sys", "0.4.0-alpha.2", "vendor/simdjson")


def body() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefix", type=Path, default=registries.ROOT / ".deps")
    prefix = parser.parse_args().prefix.resolve()
    if (prefix / "zlib/zlib.h").is_file() and (prefix / "simdjson/simdjson.h").is_file():
        registries.say(f"already in {prefix}")
        return
    zlib = registries.crate_files(*ZLIB)
    sources = {name: data for name, data in zlib.items() if name.endswith((".c", ".h"))}
    registries.write_files(sources, prefix / "zlib")
    simdjson = registries.crate_files(*SIMDJSON)
    amalgamation = {name: simdjson[name] for name in ("simdjson.cpp", "simdjson.h")}
    registries.write_files(amalgamation, prefix / "simdjson")


if __name__ == "__main__":
    registries.main(body)
