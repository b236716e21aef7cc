"""A decoder graph and its key/value cache, which stays on the device between runs.

Two layouts of names are known, and found by them: onnxruntime-genai's builder's, which ``moe-infer
export`` writes too (``past_key_values.0.key`` in, ``present.0.key`` out), and that of transformers'
own exporter (``past_key_values.layers.0.keys`` in, ``cache.layers.0.keys`` out).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort

import moe_infer

_CACHE = re.compile(r"\D*(\d+)\D*?(key|value)s?(?:_cache)?$")
_DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": ml_dtypes.bfloat16,
}
_BFLOAT16 = 16  # in ONNX


class Decoder:
    """Runs a graph token by token, for one sequence.

    Args:
        model: path of the graph.
        providers: as for :class:`moe_infer.InferenceSession`.
        context: most tokens of prompt and answer; TensorRT builds its engine for up to so many.
        chunk: most tokens in one run of the graph; a longer prompt is read in several, so that an
            engine's memory is that of so many tokens and not of the whole context.

    Raises:
        ValueError: the graph has no ``input_ids``, no ``logits`` or no cache that is recognised.
    """

    def __init__(
        self,
        model: Path | str,
        providers: Sequence[Any] | None = None,
        context: int = 2048,
        chunk: int = 256,
    ) -> None:
        if context < 1 or chunk < 1:
            raise ValueError(f"context and chunk must be at least 1, got {context} and {chunk}")
        self.context, self.chunk = context, min(chunk, context)
        self.session = moe_infer.InferenceSession(
            model, providers=providers, dims=_ranges(model, context, self.chunk)
        )
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.pairs = _pairs(self.session)
        logits = next(v for v in self.session.get_outputs() if v.name == "logits")
        self.vocabulary = logits.shape[-1] if isinstance(logits.shape[-1], int) else None
        self.device = "cpu"
        if self.session.get_providers()[0] in (
            "TensorrtExecutionProvider",
            "CUDAExecutionProvider",
        ):
            self.device = "cuda"
        self.reset()

    def reset(self) -> None:
        """Forgets all tokens."""
        self.length = 0
        self._past = {
            name: ort_value(np.zeros(_empty(self.inputs[name]), _DTYPES[self.inputs[name].type]))
            for name in self.pairs
        }

    def run(self, tokens: Sequence[int]) -> np.ndarray:
        """Takes more tokens and gives the logits (vocabulary) after the last one.

        Raises:
            ValueError: no tokens, more than the context holds, or one that the model has not.
        """
        if not tokens or self.length + len(tokens) > self.context:
            raise ValueError(
                f"{len(tokens)} tokens after {self.length}; at least one is needed, and at most"
                f" {self.context} in all"
            )
        wrong = [t for t in tokens if not 0 <= t < (self.vocabulary or t + 1)]
        if wrong:
            raise ValueError(
                f"token {wrong[0]} is none of the model's, which are 0 to"
                f" {'...' if self.vocabulary is None else self.vocabulary - 1}; is the tokenizer"
                " another model's?"
            )
        for begin in range(0, len(tokens), self.chunk):
            logits = self._run(tokens[begin : begin + self.chunk])
        return logits

    def _run(self, tokens: Sequence[int]) -> np.ndarray:
        binding = self.session.io_binding()
        for name, array in self._small(tokens).items():
            binding.bind_ortvalue_input(name, ort_value(array))
        for name, value in self._past.items():
            binding.bind_ortvalue_input(name, value)
        # The logits are read here, the cache is not: it stays where the next run needs it.
        binding.bind_output("logits", "cpu")
        for output in self.pairs.values():
            binding.bind_output(output, self.device)
        self.session.run_with_iobinding(binding)
        made = dict(zip(["logits", *self.pairs.values()], binding.get_outputs(), strict=True))
        self._past = {name: made[output] for name, output in self.pairs.items()}
        self.length += len(tokens)
        return to_numpy(made["logits"])[0, -1]

    def _small(self, tokens: Sequence[int]) -> dict[str, np.ndarray]:
        """Token ids, and what follows from their number."""
        total = self.length + len(tokens)
        values = {
            "input_ids": np.asarray([tokens]),
            "attention_mask": np.ones((1, total)),
            "position_ids": np.arange(self.length, total)[None],
            "cache_position": np.arange(self.length, total),
        }
        kinds = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}
        return {
            name: values[name].astype(kinds[value.type])
            for name, value in self.inputs.items()
            if name not in self.pairs
        }


def ort_value(array: np.ndarray) -> ort.OrtValue:
    """A value on the host; ONNX Runtime does not take bfloat16 as an array."""
    if array.dtype == ml_dtypes.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), _BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


def to_numpy(value: ort.OrtValue) -> np.ndarray:
    """The array of a value on the host, bfloat16 as float32."""
    if value.element_type() != _BFLOAT16:
        return value.numpy()
    import ctypes

    count = int(np.prod(value.shape()))
    bits = np.ctypeslib.as_array((ctypes.c_uint16 * count).from_address(value.data_ptr()))
    return bits.view(ml_dtypes.bfloat16).astype(np.float32).reshape(value.shape())


def _pairs(session: ort.InferenceSession) -> dict[str, str]:
    """Outputs of the cache by the inputs to which they go in the next run."""
    inputs = {v.name: v for v in session.get_inputs()}
    outputs = [v.name for v in session.get_outputs()]
    if "input_ids" not in inputs or "logits" not in outputs:
        raise ValueError(
            f"the graph must take input_ids and give logits; it takes {', '.join(inputs)} and gives"
            f" {', '.join(outputs)}"
        )
    made = {m.groups(): name for name in outputs if (m := _CACHE.match(name))}
    pairs = {}
    for name, value in inputs.items():
        match = _CACHE.match(name)
        if match and len(value.shape) == 4 and match.groups() in made:
            pairs[name] = made[match.groups()]
    known = {"input_ids", "attention_mask", "position_ids", "cache_position", *pairs}
    if not pairs or set(inputs) - known:
        raise ValueError(
            "the graph's key/value cache is not recognised: inputs"
            f" {', '.join(sorted(set(inputs) - known)) or 'are all known'}, outputs"
            f" {', '.join(outputs)}; expected past_key_values.N.key and present.N.key, or"
            " past_key_values.layers.N.keys and cache.layers.N.keys"
        )
    return pairs


def _empty(value: Any) -> tuple[int, ...]:
    """Shape of a cache that holds nothing: batch 1, length 0."""
    # transformers' exporter writes fixed sizes as text.
    dims = [int(d) if str(d).isdigit() else d for d in value.shape]
    _, heads, _, size = dims
    if [isinstance(d, int) for d in dims] != [False, True, False, True]:
        raise ValueError(
            f"input '{value.name}' has shape {value.shape}; expected symbolic batch and length, and"
            " fixed heads and head size"
        )
    return 1, heads, 0, size


def _ranges(model: Path | str, context: int, chunk: int) -> dict[str, tuple[int, int, int]]:
    """Ranges of the graph's symbolic dimensions: one sequence, ``chunk`` tokens after the past.

    The mask's length is the sum of both in each of the three shapes: TensorRT tries them as they
    are, and one that contradicts the others would end the building of the engine.
    """
    import onnx

    middle = context // 2
    ranges: dict[str, tuple[int, int, int]] = {}
    graph = onnx.load(model, load_external_data=False).graph
    held = {tensor.name for tensor in graph.initializer}
    for value in graph.input:
        dims = [d.dim_param for d in value.type.tensor_type.shape.dim]
        if value.name in held:
            continue
        by_axis: dict[int, tuple[int, int, int]] = {0: (1, 1, 1)}
        if _CACHE.match(value.name) and len(dims) == 4:
            by_axis[2] = (0, middle, context)
        elif value.name == "attention_mask":
            by_axis[1] = (1, middle + 1, context + chunk)
        elif value.name == "cache_position":
            by_axis = {0: (1, 1, chunk)}
        else:
            by_axis[1] = (1, 1, chunk)
        for axis, symbol in enumerate(dims):
            if symbol.isidentifier() and axis in by_axis:
                ranges.setdefault(symbol, by_axis[axis])
    return ranges
