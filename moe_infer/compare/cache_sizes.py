"""Sizes of key/value caches that a graph's attention asks for, where its inputs leave them open.

onnxruntime-genai's builder gives a symbol to the heads' size and to the length of the buffer that
holds a sliding window, though both follow from GroupQueryAttention's attributes and its query.
"""

from __future__ import annotations

import onnx

from moe_infer.graph.shapes import ValueTypes

_QUERY, _KEY, _CACHES = 0, 1, (3, 4)


def cache_sizes(model: onnx.ModelProto) -> tuple[dict[str, int], set[str]]:
    """What GroupQueryAttention nodes say about the symbols of their cache inputs.

    Args:
        model: its weights are not looked at.

    Returns:
        sizes of symbols, and the names of the inputs that are buffers of a sliding window: their
        length says nothing of how many tokens they hold.
    """
    graph = model.graph
    inputs = ValueTypes({value.name: value for value in graph.input})
    types = ValueTypes({v.name: v for v in (*graph.value_info, *graph.input)})
    sizes: dict[str, int] = {}
    windows: set[str] = set()
    for node in graph.node:
        if node.op_type != "GroupQueryAttention" or len(node.input) <= max(_CACHES):
            continue
        options = {a.name: a.i for a in node.attribute}
        head = _head_size(node, types, options)
        window = options.get("local_window_size", -1) if options.get("sliding_window_cache") else -1
        for name in (node.input[i] for i in _CACHES):
            dims = inputs.shape(name)
            if dims is None or len(dims) != 4:
                continue
            if isinstance(dims[3], str) and head:
                sizes.setdefault(dims[3], head)
            if isinstance(dims[2], str) and window > 0:
                sizes.setdefault(dims[2], window)
                windows.add(name)
    return sizes, windows


def _head_size(node: onnx.NodeProto, types: ValueTypes, options: dict[str, int]) -> int:
    """Elements of a head; 0 where the graph does not tell."""
    heads = options.get("num_heads", 0)
    if not node.input[_KEY]:  # query, key and value are packed
        heads += 2 * options.get("kv_num_heads", 0)
    dims = types.shape(node.input[_QUERY])
    width = dims[-1] if dims else None
    return width // heads if isinstance(width, int) and heads > 0 else 0
