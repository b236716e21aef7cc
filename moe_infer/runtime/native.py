"""The C entry of libmoe_infer (``ops/include/moe_infer.h``) from Python: checks, and one MoE layer.

Nothing here needs TensorRT, and ``check`` and ``weight_digest`` need no GPU. Device memory comes
from the caller, as addresses: of PyTorch tensors, PyCUDA or cuda-python allocations.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Mapping, Sequence
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


class _NextLogits(ctypes.Structure):
    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("expert_count", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    )


_STATS = (
    "runs",
    "tokens",
    "hits",
    "misses",
    "evictions",
    "bytes_fetched",
    "prefetches_used",
    "prefetches_wasted",
    "prefetch_bytes_used",
    "prefetch_bytes_wasted",
    "stall_ns",
)


class _Stats(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in _STATS)


class _Report(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_int64),
        ("weight_file", ctypes.c_char_p),
        ("weight_prefix", ctypes.c_char_p),
        ("sublayer_type", ctypes.c_char_p),
        ("device", ctypes.c_int32),
        ("streams", ctypes.c_int32),
        ("expert_count", ctypes.c_int32),
        ("slots", ctypes.c_int32),
        ("slot_bytes", ctypes.c_uint64),
        ("stats", _Stats),
        ("uses", ctypes.POINTER(ctypes.c_int64)),
        ("slot_of_expert", ctypes.POINTER(ctypes.c_int32)),
    )


_Visitor = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Report), ctypes.c_void_p)
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
    "moe_infer_layer_run_ahead": [
        _Pointer,  # layer
        _Pointer,  # hidden_states
        _Pointer,  # router_logits
        ctypes.POINTER(_NextLogits),
        _Pointer,  # output
        ctypes.c_int64,
        _Pointer,  # workspace
        ctypes.c_size_t,
        _Pointer,  # stream
    ],
    "moe_infer_layer_stats": [_Pointer, ctypes.POINTER(_Stats)],
    "moe_infer_layer_visit": [_Pointer, _Visitor, _Pointer],
    "moe_infer_visit_layers": [_Visitor, _Pointer],
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
class NextLogits:
    """Input ``next_router_logits``: what the next layer's router makes of this one's input.

    Attributes:
        ptr: device address, (tokens, expert_count).
        expert_count: of the MoE layer that runs next.
        dtype: one of ``op.DTYPES``.
    """

    ptr: int
    expert_count: int
    dtype: str


@dataclass(frozen=True)
class LayerStats:
    """What a layer did since it was made.

    Attributes:
        runs: calls of ``Layer.run``.
        tokens: tokens in all runs.
        hits: experts that were needed and lay in a slot; not counted where all experts stay.
        misses: experts that were needed and had to be fetched.
        evictions: experts that had to leave their slot.
        bytes_fetched: bytes of weights that went from host to device.
        prefetches_used: experts that were fetched ahead and then needed.
        prefetches_wasted: experts that were fetched ahead, in part at least, and not needed.
        prefetch_bytes_used: of those that were needed, what had come or was on its way by then.
        prefetch_bytes_wasted: of the others.
        stall_ns: nanoseconds for which runs waited for experts; -1 where it is not measured.
    """

    runs: int
    tokens: int
    hits: int
    misses: int
    evictions: int
    bytes_fetched: int
    prefetches_used: int
    prefetches_wasted: int
    prefetch_bytes_used: int
    prefetch_bytes_wasted: int
    stall_ns: int


@dataclass(frozen=True)
class LayerReport:
    """One live layer of the library.

    Attributes:
        id: its number in this process, never given twice.
        weight_file: as the library opened it, "" for a sub-layer without weights.
        weight_prefix: first part of its names in the file.
        sublayer_type: what an expert computes.
        device: number of the CUDA device.
        streams: experts are brought in during runs.
        expert_count: number of experts.
        slots: experts in device memory at most.
        slot_bytes: of one expert there.
        stats: what it did.
        uses: (expert_count) int64, runs that needed each expert; None where nobody counts.
        slot_of_expert: (expert_count) int32, -1: in none; None without weights.
    """

    id: int
    weight_file: str
    weight_prefix: str
    sublayer_type: str
    device: int
    streams: bool
    expert_count: int
    slots: int
    slot_bytes: int
    stats: LayerStats
    uses: np.ndarray[Any, np.dtype[np.int64]] | None
    slot_of_expert: np.ndarray[Any, np.dtype[np.int32]] | None


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


def live_layers() -> list[LayerReport]:
    """What each layer in this process did, those inside of ONNX Runtime's sessions too.

    In the order in which they were made. May be called while other threads run layers.

    Raises:
        RuntimeError: CUDA failed.
        moe_infer.errors.PluginError: there is no library.
    """
    return _visited(lambda visitor: _call("moe_infer_visit_layers", visitor, None))


def _visited(visit: Callable[[Any], None]) -> list[LayerReport]:
    """The reports that a function of the library gives to a visitor."""
    reports: list[LayerReport] = []
    errors: list[Exception] = []

    def keep(report: Any, _: Any) -> None:
        try:
            reports.append(_copy(report.contents))
        except Exception as error:  # ctypes would print it and go on
            errors.append(error)

    visit(_Visitor(keep))
    if errors:
        raise errors[0]
    return reports


def _copy(report: _Report) -> LayerReport:
    """A report that outlives the visit."""
    count = report.expert_count

    def array(pointer: Any) -> Any:
        return np.ctypeslib.as_array(pointer, (count,)).copy() if pointer else None

    return LayerReport(
        id=report.id,
        weight_file=os.fsdecode(report.weight_file),
        weight_prefix=os.fsdecode(report.weight_prefix),
        sublayer_type=report.sublayer_type.decode(),
        device=report.device,
        streams=bool(report.streams),
        expert_count=count,
        slots=report.slots,
        slot_bytes=report.slot_bytes,
        stats=_stats(report.stats),
        uses=array(report.uses),
        slot_of_expert=array(report.slot_of_expert),
    )


def _stats(stats: _Stats) -> LayerStats:
    return LayerStats(**{name: getattr(stats, name) for name in _STATS})


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
        # Kept, since at the end of Python nothing can be looked for any more.
        self._destroy = plugin.load().moe_infer_layer_destroy
        self._destroy.restype, self._destroy.argtypes = None, [_Pointer]
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
        next_logits: NextLogits | None = None,
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
            next_logits: changes no result; lets a layer that streams guess what comes next.

        Raises:
            ValueError: an argument is wrong.
            WeightFileError: the file changed or is damaged.
            RuntimeError: CUDA failed.
        """
        following = None
        if next_logits is not None:
            dtype = _dtype("next_router_logits", next_logits.dtype)
            given = _NextLogits(next_logits.ptr, next_logits.expert_count, dtype)
            following = ctypes.byref(given)
        _call(
            "moe_infer_layer_run_ahead",
            self._opened(),
            hidden_ptr,
            logits_ptr,
            following,
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
        return _stats(stats)

    def report(self) -> LayerReport:
        """What the layer is and did, and which experts it used and holds."""
        (found,) = _visited(
            lambda visitor: _call("moe_infer_layer_visit", self._opened(), visitor, None)
        )
        return found

    def close(self) -> None:
        """Frees the layer's device memory; idempotent."""
        if self._handle:
            self._destroy(self._handle)
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
