"""The C entry of libmoe_infer (``ops/include/moe_infer.h``) from Python: checks, and one MoE layer.

Nothing here needs TensorRT, and ``check`` and ``weight_digest`` need no GPU. Device memory comes
from the caller, as addresses: of PyTorch tensors, PyCUDA or cuda-python allocations.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from moe_infer.op import ATTRIBUTES, DTYPES
from moe_infer.runtime import plugin
from moe_infer.weights.errors import WeightFileError

_INT32, _FLOATS, _STRING, _FLOAT = range(4)
_INVALID, _FILE = 1, 2
_DIGEST_BYTES = 64
_KINDS = {attribute.name: attribute.kind for attribute in ATTRIBUTES}


class _Attribute(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("kind", ctypes.c_int32),
        ("count", ctypes.c_int64),
        ("data", ctypes.c_void_p),
    )


class _Inputs(ctypes.Structure):
    _fields_ = (
        ("d_model", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("has_logits", ctypes.c_int32),
        ("logits_dtype", ctypes.c_int32),
    )


_STATS = ("runs", "tokens", "hits", "misses", "evictions", "bytes_fetched")


class _Stats(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in _STATS)


_Pointer = ctypes.c_void_p
_SIGNATURES: dict[str, list[Any]] = {
    "moe_infer_check": [ctypes.POINTER(_Attribute), ctypes.c_int32, ctypes.POINTER(_Inputs)],
    "moe_infer_weight_digest": [ctypes.c_char_p, ctypes.c_char_p],
    "moe_infer_layer_create": [
        ctypes.POINTER(_Attribute),
        ctypes.c_int32,
        ctypes.POINTER(_Inputs),
        ctypes.POINTER(_Pointer),
    ],
    "moe_infer_layer_workspace": [_Pointer, ctypes.c_int64, ctypes.POINTER(ctypes.c_size_t)],
    "moe_infer_layer_run": [
        _Pointer,  # layer
        _Pointer,  # hidden_states
        _Pointer,  # router_logits
        _Pointer,  # output
        ctypes.c_int64,
        _Pointer,  # workspace
        ctypes.c_size_t,
        _Pointer,  # stream
    ],
    "moe_infer_layer_stats": [_Pointer, ctypes.POINTER(_Stats)],
}


@dataclass(frozen=True)
class LayerInputs:
    """What a layer is applied to.

    Attributes:
        d_model: last dimension of ``hidden_states``.
        dtype: type of ``hidden_states`` and of the output, one of ``op.DTYPES``.
        has_logits: input 1, ``router_logits``, is given.
        logits_dtype: its type; that of ``hidden_states`` if None.
    """

    d_model: int
    dtype: str = "float32"
    has_logits: bool = False
    logits_dtype: str | None = None


@dataclass(frozen=True)
class LayerStats:
    """What a layer did since it was made.

    Attributes:
        runs: calls of ``Layer.run``.
        tokens: tokens in all runs.
        hits: experts that were needed and lay in a slot.
        misses: experts that were needed and had to be fetched.
        evictions: experts that had to leave their slot.
        bytes_fetched: bytes of weights that went from host to device.
    """

    runs: int
    tokens: int
    hits: int
    misses: int
    evictions: int
    bytes_fetched: int


def check(attributes: Mapping[str, Any], inputs: LayerInputs | None = None) -> None:
    """Checks attributes, weight file and inputs with the library; needs no GPU.

    Args:
        attributes: the node's, as ``LayerConfig.to_attributes`` gives them.
        inputs: None: only what the attributes and the file say is checked.

    Raises:
        ValueError: an attribute or input is wrong.
        WeightFileError: the file is missing, damaged or does not fit the attributes.
        moe_infer.errors.PluginError: there is no library.
    """
    array = _AttributeArray(attributes)
    given = None if inputs is None else ctypes.byref(_native_inputs(inputs))
    _call("moe_infer_check", array.items, len(array.items), given)


def weight_digest(path: str | os.PathLike[str]) -> str:
    """Digest of a weight file's index, as attribute ``expert_weight_digest`` holds it.

    Args:
        path: as it is; not looked for in other folders.

    Raises:
        WeightFileError: the file is missing or damaged.
        moe_infer.errors.PluginError: there is no library.
    """
    digest = ctypes.create_string_buffer(_DIGEST_BYTES)
    _call("moe_infer_weight_digest", os.fsencode(path), digest)
    return digest.value.decode()


class Layer:
    """One MoE layer on the current CUDA device, without TensorRT.

    Its slots are allocated here; with ``max_concurrency`` >= ``expert_count`` all experts are
    loaded here too. Usable as a context manager, which frees them.

    Raises:
        ValueError: an attribute or input is wrong.
        WeightFileError: the file is missing, damaged or does not fit the attributes.
        RuntimeError: CUDA failed.
        moe_infer.errors.PluginError: there is no library.
    """

    def __init__(
        self,
        attributes: Mapping[str, Any],
        d_model: int,
        dtype: str,
        has_logits: bool = False,
        logits_dtype: str | None = None,
    ) -> None:
        self._handle = _Pointer()
        array = _AttributeArray(attributes)
        inputs = _native_inputs(LayerInputs(d_model, dtype, has_logits, logits_dtype))
        _call(
            "moe_infer_layer_create",
            array.items,
            len(array.items),
            ctypes.byref(inputs),
            ctypes.byref(self._handle),
        )

    def workspace(self, tokens: int) -> int:
        """Bytes of device memory that ``run`` needs for up to ``tokens`` tokens."""
        size = ctypes.c_size_t()
        _call("moe_infer_layer_workspace", self._opened(), tokens, ctypes.byref(size))
        return size.value

    def run(
        self,
        hidden_ptr: int,
        logits_ptr: int | None,
        output_ptr: int,
        tokens: int,
        workspace_ptr: int | None,
        workspace_bytes: int,
        stream: int | None = None,
    ) -> None:
        """Enqueues the layer; returns before it is done unless it streams experts.

        Args:
            hidden_ptr: device address of hidden_states, (tokens, d_model).
            logits_ptr: device address of router_logits, (tokens, expert_count), or None.
            output_ptr: device address of the output, (tokens, d_model).
            tokens: zero is legal.
            workspace_ptr: device address of scratch memory.
            workspace_bytes: its size, at least ``workspace(tokens)``.
            stream: a ``cudaStream_t`` as an integer; None: the default stream.

        Raises:
            ValueError: an argument is wrong.
            WeightFileError: the file changed or is damaged.
            RuntimeError: CUDA failed.
        """
        _call(
            "moe_infer_layer_run",
            self._opened(),
            hidden_ptr,
            logits_ptr,
            output_ptr,
            tokens,
            workspace_ptr,
            workspace_bytes,
            stream,
        )

    def stats(self) -> LayerStats:
        """What the layer did so far."""
        stats = _Stats()
        _call("moe_infer_layer_stats", self._opened(), ctypes.byref(stats))
        return LayerStats(**{name: getattr(stats, name) for name in _STATS})

    def close(self) -> None:
        """Frees the layer's device memory; idempotent."""
        if self._handle:
            destroy = plugin.load().moe_infer_layer_destroy
            destroy.restype, destroy.argtypes = None, [_Pointer]
            destroy(self._handle)
            self._handle = _Pointer()

    def _opened(self) -> ctypes.c_void_p:
        if not self._handle:
            raise ValueError("the layer is closed; make another one")
        return self._handle

    def __enter__(self) -> Layer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()


class _AttributeArray:
    """Attributes as the C entry takes them; keeps the memory that they point to."""

    def __init__(self, attributes: Mapping[str, Any]) -> None:
        self.items = (_Attribute * len(attributes))()
        self._memory: list[Any] = []
        for item, (name, value) in zip(self.items, attributes.items(), strict=True):
            item.name = name.encode()
            item.kind, item.count, data = _encode(name, value)
            item.data = ctypes.cast(data, _Pointer)
            self._memory.append(data)


def _encode(name: str, value: Any) -> tuple[int, int, Any]:
    """(kind, count, ctypes data) of one attribute."""
    if isinstance(value, str | bytes):
        text = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
        return _STRING, len(text), ctypes.create_string_buffer(text, max(len(text), 1))
    if isinstance(value, int) and not isinstance(value, bool):
        if not -(2**31) <= value < 2**31:
            raise ValueError(
                f"MoELayer: attribute '{name}' must fit 32 bits, as TensorRT passes it on, got"
                f" {value}"
            )
        return _INT32, 1, (ctypes.c_int32 * 1)(value)
    if isinstance(value, float | np.floating):
        return _FLOAT, 1, (ctypes.c_float * 1)(float(value))
    if isinstance(value, Sequence | np.ndarray):
        floats = np.asarray(value, dtype=np.float32).tobytes()
        count = len(floats) // 4
        return _FLOATS, count, (ctypes.c_float * count).from_buffer_copy(floats)
    raise ValueError(
        f"MoELayer: attribute '{name}' must be of type"
        f" {_KINDS.get(name, 'int, float, floats or string')}, got {type(value).__name__}"
    )


def _native_inputs(inputs: LayerInputs) -> _Inputs:
    return _Inputs(
        inputs.d_model,
        _dtype("hidden_states", inputs.dtype),
        int(inputs.has_logits),
        _dtype("router_logits", inputs.logits_dtype or inputs.dtype),
    )


def _dtype(name: str, dtype: str) -> int:
    if dtype not in DTYPES:
        raise ValueError(
            f"MoELayer: input {name} must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {dtype}"
        )
    return DTYPES.index(dtype)


@functools.cache
def _function(name: str) -> Any:
    function = getattr(plugin.load(), name)
    function.argtypes = _SIGNATURES[name]
    function.restype = ctypes.c_int
    return function


def _call(name: str, *arguments: Any) -> None:
    """Calls a function that returns a status, and raises the library's sentence for an error."""
    status = _function(name)(*arguments)
    if status == 0:
        return
    library = plugin.load()  # plugin.py declared moe_infer_last_error
    message = library.moe_infer_last_error().decode(errors="replace")
    if status == _INVALID:
        raise ValueError(message)
    if status == _FILE:
        raise WeightFileError(message)
    raise RuntimeError(message)
