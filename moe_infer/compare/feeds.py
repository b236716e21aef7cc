"""Random inputs for a graph: symbolic dimensions that agree, token ids that exist, masks of ones.

What a decoder's inputs mean follows from their names, as transformers and onnxruntime-genai write
them: ``input_ids`` and ``position_ids`` (batch, sequence), ``attention_mask`` (batch, past +
sequence), ``past_key_values.N.key`` (batch, heads, past, head size), ``cache_position`` (sequence).
All other inputs get unit variance, or 0 and 1 where they are whole numbers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from moe_infer.compare.cache_sizes import cache_sizes
from moe_infer.graph.dimensions import evaluate, names_in
from moe_infer.graph.shapes import Dim, ValueTypes, element_type_name

Array = np.ndarray[Any, Any]
Sizes = dict[str, int]

PAST = re.compile(r"past_?key_?values?[._].*(key|value)|past[._]\w*(key|value)", re.I)
"""Names of key/value cache inputs."""

_DEFAULTS = (("batch", 2), ("past", 3), ("seq", 5))
_OTHER_DEFAULT = 4
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
_ID_LAYOUT = ("Cast", "Reshape", "Flatten", "Identity", "Unsqueeze", "Squeeze")


def make_feeds(
    model: onnx.ModelProto,
    *,
    given: Mapping[str, Array] | None = None,
    dims: Mapping[str, int] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
) -> dict[str, Array]:
    """One array for each input of a graph.

    Args:
        model: its weights are not looked at.
        given: arrays to take as they are; their sizes decide the symbols of their dimensions.
        dims: size of symbolic dimensions by name.
        shapes: whole shape of an input by its name.
        seed: of the random values.

    Raises:
        ValueError: a name is unknown, sizes contradict each other, or an input's type has no random
            values.
    """
    given, dims, shapes = given or {}, dims or {}, shapes or {}
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    inputs = _inputs(model)
    for name in shapes:
        _check_name(name, inputs)
    given = check_given(model, given)
    known, windows = cache_sizes(model)
    sizes = _sizes(model, inputs, given, dims, shapes, known, windows)
    rng = np.random.default_rng(seed)
    bounds = _vocabularies(model, inputs)
    past = _past(inputs, sizes, windows)
    feeds = {}
    for name, (element, symbols) in inputs.items():
        if name in given:
            feeds[name] = given[name]
            continue
        shape = (
            tuple(int(n) for n in shapes[name])
            if name in shapes
            else tuple(_size(_symbol(name, i, d), sizes) for i, d in enumerate(symbols))
        )
        feeds[name] = _values(rng, name, element, shape, bounds.get(name), past)
    return feeds


def check_given(model: onnx.ModelProto, given: Mapping[str, Array]) -> dict[str, Array]:
    """Arrays for inputs of a graph, whose names and types must be the inputs'.

    Raises:
        ValueError: they are not.
    """
    inputs = _inputs(model)
    for name in given:
        _check_name(name, inputs)
    return {name: _typed(name, inputs[name][0], array) for name, array in given.items()}


def _check_name(name: str, inputs: Collection[str]) -> None:
    if name not in inputs:
        raise ValueError(f"the model has no input '{name}'; it has {', '.join(inputs)}")


def _inputs(model: onnx.ModelProto) -> dict[str, tuple[int, tuple[Dim, ...]]]:
    """Element type and dimensions of each input that is no initializer."""
    constants = {tensor.name for tensor in model.graph.initializer}
    types = ValueTypes({value.name: value for value in model.graph.input})
    found = {}
    for value in model.graph.input:
        if value.name in constants:
            continue
        shape = types.shape(value.name)
        if shape is None:
            raise ValueError(
                f"input '{value.name}' has no known rank, so no array can be made for it; give it"
            )
        found[value.name] = (types.element_type(value.name), shape)
    return found


# Sizes of symbolic dimensions


def _symbol(name: str, axis: int, dim: Dim) -> int | str:
    """A dimension's number or symbol; one without a name gets one of its own."""
    if dim is None:
        return "batch" if axis == 0 else f"{name}[{axis}]"
    return dim


def _sizes(
    model: onnx.ModelProto,
    inputs: Mapping[str, tuple[int, tuple[Dim, ...]]],
    given: Mapping[str, Array],
    dims: Mapping[str, int],
    shapes: Mapping[str, Sequence[int]],
    fixed: Sizes,
    windows: Collection[str],
) -> Sizes:
    symbols = list(
        dict.fromkeys(
            s
            for name, (_, dims_of) in inputs.items()
            for s in (_symbol(name, i, d) for i, d in enumerate(dims_of))
            if isinstance(s, str)
        )
    )
    known = sorted({n for s in symbols for n in names_in(s)} | set(symbols))
    sizes: Sizes = {}
    for name, size in dims.items():
        if name not in known:
            raise ValueError(
                f"no input has a dimension '{name}'; symbolic dimensions are"
                f" {', '.join(known) or 'none'}"
            )
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"dimension '{name}' must be a size of at least 0, got {size!r}")
        sizes[name] = size
    stated = {**{n: a.shape for n, a in given.items()}, **{n: tuple(s) for n, s in shapes.items()}}
    for name, shape in stated.items():
        _learn(name, inputs[name][1], shape, sizes)
    for symbol in symbols:
        if symbol in fixed:
            sizes.setdefault(symbol, fixed[symbol])
    _complete(model, inputs, symbols, sizes, windows)
    return sizes


def _learn(name: str, dims: Sequence[Dim], shape: Sequence[int], sizes: Sizes) -> None:
    """Takes the sizes of an input's symbols from a shape that was given for it."""
    if len(dims) != len(shape):
        raise ValueError(f"input '{name}' has rank {len(dims)}, but shape {tuple(shape)} was given")
    for axis, (dim, size) in enumerate(zip(dims, shape, strict=True)):
        symbol = _symbol(name, axis, dim)
        expected = symbol if isinstance(symbol, int) else sizes.get(symbol)
        if expected is not None and expected != size:
            raise ValueError(
                f"input '{name}' has {size} at dimension {axis} ({symbol}), but {expected} is"
                " needed there"
            )
        if isinstance(symbol, str):
            sizes[symbol] = int(size)


def _complete(
    model: onnx.ModelProto,
    inputs: Mapping[str, tuple[int, tuple[Dim, ...]]],
    symbols: Sequence[str],
    sizes: Sizes,
    windows: Collection[str],
) -> None:
    """Gives a size to every symbol that has none: sums of others last."""
    mask = next((n for n in inputs if n.endswith("attention_mask")), None)
    query = next((n for n in inputs if n.endswith(("input_ids", "inputs_embeds"))), None)
    total, batch = _mask_symbol(inputs, mask, 1), _mask_symbol(inputs, mask, 0)
    # GroupQueryAttention takes several new tokens after a past for one sequence only.
    one_batch = any(node.op_type == "GroupQueryAttention" for node in model.graph.node)
    for symbol in symbols:
        names = names_in(symbol)
        for name in names if names != [symbol] else [symbol]:
            if name not in sizes and name not in (total, batch) and symbol not in sizes:
                sizes[name] = _default(name, one_batch)
    if total is not None and total not in sizes and names_in(total) == [total]:
        length = _dim(inputs, query, 1, sizes)
        past = _past(inputs, sizes, windows)
        sizes[total] = past + (length if length is not None else _default("seq", one_batch))
    if batch is not None and batch not in sizes and names_in(batch) == [batch]:
        rows = _dim(inputs, query, 0, sizes)
        sizes[batch] = rows if rows is not None else _default("batch", one_batch)


def _mask_symbol(
    inputs: Mapping[str, tuple[int, tuple[Dim, ...]]], mask: str | None, axis: int
) -> str | None:
    """The symbol of attention_mask's batch or length, if nothing else has it."""
    if mask is None or len(inputs[mask][1]) != 2:
        return None
    symbol = _symbol(mask, axis, inputs[mask][1][axis])
    others = {d for n, (_, dims) in inputs.items() if n != mask for d in dims}
    return symbol if isinstance(symbol, str) and symbol not in others else None


def _past(
    inputs: Mapping[str, tuple[int, tuple[Dim, ...]]], sizes: Sizes, windows: Collection[str]
) -> int:
    """Tokens in the key/value cache."""
    caches = [n for n, (_, d) in inputs.items() if PAST.search(n) and len(d) == 4]
    whole = [name for name in caches if name not in windows]
    length = _dim(inputs, next(iter(whole), None), 2, sizes)
    return length or 0


def _dim(
    inputs: Mapping[str, tuple[int, tuple[Dim, ...]]], name: str | None, axis: int, sizes: Sizes
) -> int | None:
    if name is None or len(inputs[name][1]) <= axis:
        return None
    return _size(_symbol(name, axis, inputs[name][1][axis]), sizes)


def _default(symbol: str, one_batch: bool) -> int:
    lowered = symbol.lower()
    for word, size in _DEFAULTS:
        if word in lowered:
            return 1 if word == "batch" and one_batch else size
    return _OTHER_DEFAULT


def _size(symbol: int | str, sizes: Sizes) -> int:
    return symbol if isinstance(symbol, int) else evaluate(symbol, sizes)


# Values


def _vocabularies(model: onnx.ModelProto, inputs: Mapping[str, object]) -> dict[str, int]:
    """Rows of the tables that inputs are indices of."""
    sizes = {t.name: t.dims[0] for t in model.graph.initializer if t.dims}
    sources = {name: name for name in inputs}
    found: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type in _ID_LAYOUT and node.input[0] in sources:
            sources[node.output[0]] = sources[node.input[0]]
        for table, index in _lookups(node):
            if table in sizes and index in sources:
                name = sources[index]
                found[name] = min(sizes[table], found.get(name, sizes[table]))
    return found


def _lookups(node: onnx.NodeProto) -> Iterator[tuple[str, str]]:
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    if node.op_type == "Gather" and axis == 0:
        yield node.input[0], node.input[1]
    if node.op_type == "EmbedLayerNormalization":
        yield node.input[2], node.input[0]


def _values(
    rng: np.random.Generator,
    name: str,
    element: int,
    shape: tuple[int, ...],
    bound: int | None,
    past: int,
) -> Array:
    if element in _FLOATS:
        kind = ml_dtypes.bfloat16 if element == TensorProto.BFLOAT16 else _numpy(element)
        return rng.standard_normal(shape).astype(kind)
    kind = None if element == TensorProto.STRING else _numpy(element)
    if kind is None or np.dtype(kind).kind not in "iub":
        raise ValueError(
            f"input '{name}' has type {element_type_name(element)}, for which there are no random"
            " values; give an array for it"
        )
    if "mask" in name:
        return np.ones(shape, kind)
    if "position" in name and shape:
        return np.broadcast_to(past + np.arange(shape[-1]), shape).astype(kind)
    return rng.integers(0, bound if bound is not None else 2, shape).astype(kind)


def _typed(name: str, element: int, array: Array) -> Array:
    """A given array, which must be of the input's type."""
    if element in (TensorProto.UNDEFINED, TensorProto.STRING):
        return array
    bfloat16 = element == TensorProto.BFLOAT16
    wanted = np.dtype(ml_dtypes.bfloat16) if bfloat16 else _numpy(element)
    if bfloat16 and array.dtype == np.dtype("V2"):
        return array.view(wanted)  # what a .npy file makes of it
    if array.dtype != wanted:
        raise ValueError(
            f"input '{name}' is {array.dtype}, but the model takes {wanted}; convert it with"
            f" astype('{wanted}')"
        )
    return array


def _numpy(element: int) -> np.dtype[Any]:
    return np.dtype(helper.tensor_dtype_to_np_dtype(element))


def ort_value(array: Array) -> ort.OrtValue:
    """A value for ONNX Runtime, which does not take bfloat16 (``ml_dtypes``) as an array."""
    if array.dtype.name != "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
    bits = np.ascontiguousarray(array).view(np.uint16)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)
