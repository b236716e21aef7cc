"""Brings files out of packages of crates.io (cargo), Maven (mvn) and PyPI (pip).

The clients do the work, with whatever mirror or proxy the user has configured for them; they check
the checksums. Every version is pinned by the caller.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class ToolError(Exception):
    """Something that the user must put right; the message says what."""


def say(text: str) -> None:
    print(f"[{Path(sys.argv[0]).stem}] {text}", flush=True)


def main(body: Callable[[], None]) -> None:
    """Runs a tool's body; a ToolError ends it with its message."""
    try:
        body()
    except ToolError as error:
        sys.exit(f"[{Path(sys.argv[0]).stem}] {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def need(program: str, remedy: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise ToolError(f"{program} is not installed; {remedy}")
    return found


def run(command: list[str], failed: str, cwd: Path | None = None) -> None:
    """Runs a client with its own progress on the terminal."""
    if subprocess.run(command, cwd=cwd).returncode != 0:
        raise ToolError(f"{failed} (command: {' '.join(command)})")


def crate_files(crate: str, version: str, folder: str) -> dict[str, bytes]:
    """Files right in `folder` of a crate, by name."""
    cargo = need("cargo", "apt-get install cargo, or rustup")
    say(f"crate {crate} {version}")
    archive = cached_crate(crate, version)
    if archive is None:
        with tempfile.TemporaryDirectory() as temporary:
            fetch_crate(cargo, crate, version, Path(temporary))
        archive = cached_crate(crate, version)
    if archive is None:
        raise ToolError(f"cargo has not left {crate}-{version}.crate in {cargo_home()}/registry")
    wanted = f"{crate}-{version}/{folder}/"
    files = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix(wanted)
            if member.isfile() and member.name.startswith(wanted) and "/" not in name:
                content = tar.extractfile(member)
                assert content is not None
                files[name] = content.read()
    if not files:
        raise ToolError(f"{archive} has no folder {folder}")
    return files


def cargo_home() -> Path:
    return Path(os.environ.get("CARGO_HOME") or Path.home() / ".cargo")


def cached_crate(crate: str, version: str) -> Path | None:
    return next(cargo_home().glob(f"registry/cache/*/{crate}-{version}.crate"), None)


def fetch_crate(cargo: str, crate: str, version: str, folder: Path) -> None:
    """Makes cargo download one crate into its cache."""
    # `cargo info` downloads just this crate, but is younger than Debian 12's cargo; `cargo fetch`
    # also brings all that the crate depends on.
    info = [cargo, "info", "--quiet", f"{crate}@{version}"]
    if subprocess.run(info, cwd=folder, capture_output=True).returncode == 0:
        return
    (folder / "src").mkdir()
    (folder / "src/lib.rs").touch()
    (folder / "Cargo.toml").write_text(
        '[package]\nname = "fetch"\nversion = "0.0.0"\nedition = "2021"\n'
        f'[dependencies]\n{crate} = {{ version = "={version}", default-features = false }}\n'
    )
    run([cargo, "fetch"], f"cargo cannot fetch {crate} {version}: no network?", cwd=folder)


def maven_files(artifact: str, names: Mapping[str, str], destination: Path) -> None:
    """Extracts members of a jar: {member: file name} into `destination`."""
    mvn = need("mvn", "apt-get install maven")
    say(f"Maven artifact {artifact}")
    destination.mkdir(parents=True, exist_ok=True)
    # The copy lies where the files go, so that there is room for both or for neither.
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".jar-") as temporary:
        copy = ["dependency:copy", f"-Dartifact={artifact}", f"-DoutputDirectory={temporary}"]
        run(
            [mvn, "--batch-mode", *copy],
            f"mvn cannot bring {artifact}: no network?",
            cwd=Path(temporary),
        )
        jar = next(Path(temporary).glob("*.jar"))
        with zipfile.ZipFile(jar) as archive:
            for member, name in names.items():
                say(f"extracting {name} ({archive.getinfo(member).file_size >> 20} MiB)")
                with archive.open(member) as source, replaced(destination / name) as target:
                    shutil.copyfileobj(source, target, 1 << 20)


def pip_target(requirements: tuple[str, ...], destination: Path) -> None:
    """pip install --no-deps --target."""
    say(f"{', '.join(requirements)} -> {destination}")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--upgrade"]
    run(
        [*install, "--target", str(destination), *requirements],
        "pip cannot bring the packages: no network, or no pip (apt-get install python3-pip)?",
    )


def write_files(files: Mapping[str, bytes], destination: Path) -> None:
    destination.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with replaced(destination / name) as target:
            target.write(content)
    say(f"{len(files)} files -> {destination}")


class replaced:  # noqa: N801  (reads like a function)
    """Writes a file beside `path` and puts it in its place at the end: no half file stays."""

    def __init__(self, path: Path) -> None:
        self.path, self.part = path, path.with_name(path.name + ".part")

    def __enter__(self):
        self.file = self.part.open("wb")
        return self.file

    def __exit__(self, kind, *_) -> None:
        self.file.close()
        if kind is None:
            self.part.replace(self.path)
        else:
            self.part.unlink()
