"""A transformers decoder with its key/value cache as inputs and outputs, as generation needs it.

The names are those of onnxruntime-genai's builder: ``input_ids``, ``position_ids`` (batch,
sequence_length), ``attention_mask`` (batch, total_sequence_length), ``past_key_values.N.key`` and
``.value`` (batch, heads, past_sequence_length, size) in, ``logits`` and ``present.N.key`` out.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

BATCH, SEQ, PAST = 2, 3, 4
"""Sizes of the example inputs: none is 0 or 1, which torch.export would take for constants."""

_BATCH_NAME, _SEQ_NAME, _PAST_NAME, _TOTAL_NAME = (
    "batch_size",
    "sequence_length",
    "past_sequence_length",
    "total_sequence_length",
)


class Decoder(nn.Module):  # type: ignore[misc]
    """Takes and returns the cache as plain tensors.

    Args:
        model: a causal language model of transformers 5, in evaluation mode.
        cached: with a key/value cache; without one only ``input_ids`` and ``attention_mask`` go in.

    Raises:
        ValueError: the model keeps something else than keys and values.
    """

    def __init__(self, model: Any, cached: bool = True) -> None:
        super().__init__()
        self.model = model
        self.cached = cached
        parameters = inspect.signature(model.forward).parameters
        # transformers 5.20 and newer call the cache "cache"; older ones know the long name alone.
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"
        self.sizes = self._cache_sizes() if cached else []
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *rest: Tensor) -> Any:
        """Logits, and with a cache all keys and values, layer by layer."""
        if not self.cached:
            return self.model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).logits
        position_ids, *past = rest
        cache = _cache(past)
        logits = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **{self.cache_name: cache},
        ).logits
        return (logits, *_flat(cache))

    @property
    def input_names(self) -> list[str]:
        """Of the graph."""
        names = ["input_ids", "attention_mask"]
        return names + ["position_ids", *self._pairs("past_key_values")] * self.cached

    @property
    def output_names(self) -> list[str]:
        """Of the graph."""
        return ["logits", *self._pairs("present")]

    def example(self) -> tuple[Tensor, ...]:
        """Inputs for the export."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(0, vocabulary, (BATCH, SEQ), generator=generator)
        if not self.cached:
            return ids, torch.ones(BATCH, SEQ, dtype=torch.int64)
        mask = torch.ones(BATCH, PAST + SEQ, dtype=torch.int64)
        positions = torch.arange(PAST, PAST + SEQ).repeat(BATCH, 1)
        dtype = self.model.dtype
        past = [
            torch.randn(BATCH, heads, PAST, size, generator=generator).to(dtype)
            for heads, size in self.sizes
        ]
        inputs = (ids, mask, positions, *past)
        return tuple(value.to(self.model.device) for value in inputs)

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """Names of the dimensions that vary, as torch.onnx.export takes them."""
        two = {0: _BATCH_NAME, 1: _SEQ_NAME}
        if not self.cached:
            return two, two
        past = {0: _BATCH_NAME, 2: _PAST_NAME}
        return two, {0: _BATCH_NAME, 1: _TOTAL_NAME}, (two, *(past for _ in self.sizes))

    def _pairs(self, prefix: str) -> list[str]:
        return [f"{prefix}.{i // 2}.{('key', 'value')[i % 2]}" for i in range(len(self.sizes))]

    def _cache_sizes(self) -> list[tuple[int, int]]:
        """Heads and size of each key and value, layer by layer, from a run of two tokens."""
        ids = torch.zeros(1, 2, dtype=torch.int64, device=self.model.device)
        cache = _cache([])
        kind = type(self.model).__name__
        with torch.no_grad():
            self.model(input_ids=ids, use_cache=True, **{self.cache_name: cache})
        try:
            tensors = _flat(cache)
        except AttributeError as error:
            raise ValueError(f"{kind} keeps more than keys and values ({error})") from error
        layers = self.model.config.get_text_config().num_hidden_layers
        if len(tensors) != 2 * layers or any(t.dim() != 4 or t.shape[2] != 2 for t in tensors):
            raise ValueError(
                f"{kind} keeps {[tuple(t.shape) for t in tensors]} for its {layers} layers after"
                " two tokens; expected keys and values (batch, heads, tokens, size) of each"
            )
        return [(int(t.shape[1]), int(t.shape[3])) for t in tensors]


def _cache(past: list[Tensor]) -> Any:
    """A cache that keeps all tokens of every layer; sliding windows are the mask's affair."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for i in range(0, len(past), 2):
        cache.update(past[i], past[i + 1], i // 2)
    return cache


def _flat(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
