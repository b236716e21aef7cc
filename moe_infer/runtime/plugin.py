"""Finds and loads libmoe_infer.so, and what it and ONNX Runtime's TensorRT provider need.

The way at ``import moe_infer`` (``preload``):

1. Without an NVIDIA driver nothing is loaded: the import stays cheap, and silent.
2. CUDA, cuDNN and TensorRT of the pip packages are loaded in the order of their dependencies, so
   that the loader finds them by name when ONNX Runtime loads its provider; nobody sets
   LD_LIBRARY_PATH. What is already in the process stays.
3. libmoe_infer.so is loaded and registers its creators with the TensorRT that is in the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import json
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_infer.errors import PluginError

LIBRARY_NAME = "libmoe_infer.so"
LIBRARY_VARIABLE = "MOE_INFER_LIBRARY"
BUILD_HINT = "build it with `python setup.py build_ext --tensorrt-prefix=DIR --cuda-prefix=DIR`"

_PACKAGE = Path(__file__).resolve().parent.parent
_DEFAULT_TENSORRT_MAJOR = 10

# In the order of their dependencies: a library stands behind those that it needs.
_CUDA_LIBRARIES = (
    "libcudart.so.*",
    "libnvJitLink.so.*",
    "libnvrtc.so.*",
    "libcublasLt.so.*",
    "libcublas.so.*",
    "libcufft.so.*",
    "libcurand.so.*",
    "libcudnn.so.*",
)
_TENSORRT_LIBRARIES = (
    "libnvinfer.so.*",
    "libnvinfer_builder_resource*.so.*",
    "libnvinfer_plugin.so.*",
    "libnvonnxparser.so.*",
)

# What this module calls of ops/include/moe_infer.h; none takes an argument.
_FUNCTIONS: dict[str, Any] = {
    "moe_infer_last_error": ctypes.c_char_p,
    "moe_infer_clear_last_error": None,
    "moe_infer_tensorrt_headers_version": ctypes.c_char_p,
    "moe_infer_register": ctypes.c_int,
}

_lock = threading.RLock()
_library: ctypes.CDLL | None = None
_registered = False


@dataclass(frozen=True)
class PluginStatus:
    """Whether models can run through TensorRT with the compiled plugin, and if not, why.

    Attributes:
        usable: The library is loaded, registered with a TensorRT, and a GPU is there.
        reason: One sentence; what is missing and what helps, or what is used.
        library: The library's path, None when there is none.
        tensorrt_version: Version of the TensorRT in the process, such as "10.6.0".
        headers_version: Version of the TensorRT headers that the library was built with.
    """

    usable: bool
    reason: str
    library: Path | None = None
    tensorrt_version: str | None = None
    headers_version: str | None = None


def require_onnxruntime() -> None:
    """Checks that ONNX Runtime is installed.

    Raises:
        ImportError: It is not; the message names the extras that bring it.
    """
    spec = importlib.util.find_spec("onnxruntime")
    # A folder that an uninstall left behind is found as a namespace package, without an origin.
    if spec is None or spec.origin is None:
        raise ImportError(
            "moe_infer needs ONNX Runtime, which is not installed. Its CPU and GPU wheels exclude "
            "each other, so choose one: pip install 'moe-infer[cpu]' or "
            "pip install 'moe-infer[gpu]'"
        )


def find_library() -> Path | None:
    """Finds libmoe_infer.so.

    The first that exists of: the path in MOE_INFER_LIBRARY (empty: no library is used), the file
    beside the package, and ``build/`` of a source tree.

    Raises:
        PluginError: MOE_INFER_LIBRARY names a file that does not exist.
    """
    chosen = os.environ.get(LIBRARY_VARIABLE)
    if chosen is not None:
        if chosen and not Path(chosen).is_file():
            raise PluginError(
                f"{LIBRARY_VARIABLE} is {chosen!r}, which is not a file; correct or unset it"
            )
        return Path(chosen).resolve() if chosen else None
    for path in (_PACKAGE / LIBRARY_NAME, _PACKAGE.parent / "build" / LIBRARY_NAME):
        if path.is_file():
            return path
    return None


def preload() -> None:
    """Loads what TensorRT needs and the plugin, if they are there; ``import moe_infer`` calls it.

    Raises:
        PluginError: The TensorRT in the process is of another major version than the headers the
            library was built with. The message names both versions, both paths and the remedy.
            Anything else that fails is silent here; ``status`` tells it.
    """
    if has_driver():
        _preload_pip_libraries()
    with contextlib.suppress(PluginError):
        _load_library()
    if _library is None:
        return
    if has_driver() and tensorrt_in_process() is None:
        # Not from pip: what the loader finds by itself (LD_LIBRARY_PATH, ld.so.cache). ONNX Runtime
        # would load it only with its provider, too late for the plugin to be registered.
        _try_load(f"libnvinfer.so.{_headers_major(_library)}")
    _register(_library)


def load() -> ctypes.CDLL:
    """Loads libmoe_infer.so and registers its creators if a TensorRT is in the process.

    Idempotent and thread-safe.

    Raises:
        PluginError: There is no library, it cannot be loaded, or TensorRT's major version is not
            its headers'.
    """
    library = _load_library()
    _register(library)
    return library


def status() -> PluginStatus:
    """Says whether the plugin can be used here. Never raises."""
    path: Path | None = None
    headers: str | None = None
    tensorrt: str | None = None
    try:
        path = find_library()
        library = _load_library()
        headers = library.moe_infer_tensorrt_headers_version().decode()
        found = tensorrt_in_process()
        tensorrt = _tensorrt_version(found) if found else None
        _register(library)
        reason = _what_is_missing(headers, found)
    except Exception as error:  # whatever it is, the caller wants it as the reason
        return PluginStatus(False, str(error) or repr(error), path, tensorrt, headers)
    if reason:
        return PluginStatus(False, reason, path, tensorrt, headers)
    return PluginStatus(True, f"{path} with TensorRT {tensorrt} ({found})", path, tensorrt, headers)


def tensorrt_in_process() -> Path | None:
    """Path of the libnvinfer that this process has loaded, None if none is."""
    try:
        maps = Path("/proc/self/maps").read_text(errors="surrogateescape")
    except OSError:
        return None
    found = re.search(r"^(?:\S+\s+){5}(/.*/libnvinfer\.so\.\d.*)$", maps, re.MULTILINE)
    return Path(found.group(1)) if found else None


@functools.cache
def has_driver() -> bool:
    """True if the NVIDIA driver's library is installed."""
    return _try_load("libcuda.so.1") is not None


def gpu_count() -> int:
    """Number of GPUs that the driver shows to this process; 0 without a driver."""
    if not has_driver():
        return 0
    driver = ctypes.CDLL("libcuda.so.1")
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def _what_is_missing(headers: str, tensorrt: Path | None) -> str:
    """What keeps the loaded library from being used with TensorRT; "" if nothing does."""
    if not headers:
        return "libmoe_infer.so was built without TensorRT (-Dtensorrt=disabled)"
    if not has_driver():
        return "no NVIDIA driver is installed (libcuda.so.1 was not found)"
    if tensorrt is None:
        major = headers.split(".")[0]
        return (
            f"no TensorRT {major} was found: pip install 'moe-infer[gpu]', or put the folder of "
            f"libnvinfer.so.{major} into LD_LIBRARY_PATH"
        )
    if gpu_count() == 0:
        return "the NVIDIA driver shows no GPU to this process"
    return ""


def _load_library() -> ctypes.CDLL:
    global _library
    with _lock:
        if _library is None:
            path = find_library()
            if path is None:
                raise PluginError(_why_not_built())
            try:
                # Global, as TensorRT looks its plugins up; now, so that a missing symbol is told
                # here.
                library = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_GLOBAL)
                for name, result in _FUNCTIONS.items():
                    getattr(library, name).restype = result
                    getattr(library, name).argtypes = []
            except (OSError, AttributeError) as error:
                raise PluginError(f"{path} cannot be used ({error}); {BUILD_HINT}") from error
            _library = library
        return _library


def _register(library: ctypes.CDLL) -> None:
    """Registers the creators once a TensorRT is in the process; the library compares versions."""
    global _registered
    with _lock:
        if (
            _registered
            or not library.moe_infer_tensorrt_headers_version()
            or tensorrt_in_process() is None
        ):
            return
        if library.moe_infer_register() != 0:
            message = library.moe_infer_last_error().decode(errors="replace")
            raise PluginError(
                f"{message} (to go without the plugin, set {LIBRARY_VARIABLE} to the empty string)"
            )
        _registered = True


def _why_not_built() -> str:
    """Why there is no library: what setup.py recorded at the installation, else what to do."""
    if os.environ.get(LIBRARY_VARIABLE) == "":
        return f"the plugin is switched off: {LIBRARY_VARIABLE} is the empty string"
    try:
        record = json.loads((_PACKAGE / "build_record.json").read_text())
        missing = "; ".join(str(entry) for entry in record["missing"])
    except (OSError, ValueError, KeyError, TypeError):
        missing = ""
    if missing:
        return f"moe-infer was installed without the plugin ({missing}); {BUILD_HINT}"
    return f"the plugin is not built: there is no {LIBRARY_NAME}; {BUILD_HINT}"


def _headers_major(library: ctypes.CDLL) -> int:
    major = library.moe_infer_tensorrt_headers_version().decode().split(".")[0]
    return int(major) if major.isdigit() else _DEFAULT_TENSORRT_MAJOR


def _tensorrt_version(path: Path) -> str:
    """Version of the loaded TensorRT at `path`.

    The library's number is 10000 * major + 100 * minor + patch; before TensorRT 10 it was
    1000 * major + 100 * minor + patch.
    """
    get_version = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY).getInferLibVersion
    get_version.restype = ctypes.c_int32
    number = int(get_version())
    thousand = 10000 if number >= 10000 else 1000
    return f"{number // thousand}.{number % thousand // 100}.{number % 100}"


def _preload_pip_libraries() -> None:
    """Loads CUDA, cuDNN and TensorRT of the pip packages, each once; skips what is absent."""
    folders = sorted(folder for root in _package_folders("nvidia") for folder in root.glob("*/lib"))
    # Two CUDA major versions can be installed side by side; the newest layout (nvidia/cu13) is
    # tried first, and one process takes one.
    folders.sort(key=lambda folder: not re.fullmatch(r"cu\d+", folder.parent.name))
    for pattern in _CUDA_LIBRARIES:
        _load_first(folders, pattern)
    if tensorrt_in_process() is None:
        for pattern in _TENSORRT_LIBRARIES:
            _load_all(_package_folders("tensorrt_libs"), pattern)


def _package_folders(package: str) -> list[Path]:
    """Folders of an installed package, found without importing it."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return []
    locations = spec.submodule_search_locations if spec else None
    return [Path(location) for location in locations or ()]


def _load_first(folders: list[Path], pattern: str) -> None:
    """Loads the first library of `folders` that matches, unless the process already has one."""
    if _is_loaded(pattern):
        return
    for folder in folders:
        for path in sorted(folder.glob(pattern)):
            if _try_load(str(path)) is not None:
                return


def _load_all(folders: list[Path], pattern: str) -> None:
    for folder in folders:
        for path in sorted(folder.glob(pattern)):
            _try_load(str(path))


def _is_loaded(pattern: str) -> bool:
    try:
        maps = Path("/proc/self/maps").read_text(errors="surrogateescape")
    except OSError:
        return False
    return (
        re.search("/" + re.escape(pattern).replace(r"\*", ".*") + "$", maps, re.MULTILINE)
        is not None
    )


def _try_load(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name, mode=os.RTLD_LAZY | os.RTLD_GLOBAL)
    except OSError:
        return None
