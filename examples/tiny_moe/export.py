"""Exports a trained model to ONNX with torch.onnx (dynamo), as a user would bring it.

    python -m examples.tiny_moe.export t5_top1        # writes examples/tiny_moe/t5_top1.onnx
    python -m examples.tiny_moe.export gated_top2

Input ``tokens`` (1, seq) int64 with seq 1 to 256, output ``logits`` (1, seq, vocabulary) float32.
The weights stay where they are: the graph's initializers point into ``VARIANT.safetensors`` beside
it, so that the committed graph holds no second copy of them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import onnx
import torch

from examples.tiny_moe.model import LanguageModel, ModelConfig

HERE = Path(__file__).parent
VARIANTS = ("t5_top1", "gated_top2")
OPSET = 20
"""The newest that TensorRT 10 reads in full."""
INLINE_BYTES = 1024
"""A weight up to this size may be stored in the graph itself."""


def read_index(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Header of a safetensors file and the offset at which its data begin."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def load_model(variant: str, folder: Path = HERE) -> LanguageModel:
    """The trained model in evaluation mode, its parameters float16.

    Raises:
        FileNotFoundError: the folder holds no weights or record of ``variant``.
        RuntimeError: the weights are not those of the record's sizes (PyTorch's text).
    """
    record = json.loads((folder / f"{variant}.json").read_text(encoding="utf-8"))
    path = folder / f"{variant}.safetensors"
    index, start = read_index(path)
    data = path.read_bytes()
    state = {}
    for name, entry in index.items():
        if name != "__metadata__":
            begin, end = (start + offset for offset in entry["data_offsets"])
            raw = torch.frombuffer(bytearray(data[begin:end]), dtype=torch.float16)
            state[name] = raw.view(entry["shape"])
    model = LanguageModel(ModelConfig(**record["model"]))
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    model.load_state_dict(state)
    return model.eval()


def export_graph(model: LanguageModel) -> onnx.ModelProto:
    """The graph with its weights inside, without names of this machine or of source lines."""
    program = torch.onnx.export(
        model,
        (torch.zeros(1, 17, dtype=torch.int64),),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=["tokens"],
        output_names=["logits"],
        dynamic_shapes={"tokens": {1: torch.export.Dim("seq", min=1, max=model.config.context)}},
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    proto = program.model_proto
    _strip(proto)
    return proto


def refer_to_weights(proto: onnx.ModelProto, weights: Path) -> int:
    """Replaces the content of initializers by their place in ``weights``; returns how many.

    Raises:
        ValueError: an initializer differs from the tensor of its name, or a large one is not there.
    """
    index, start = read_index(weights)
    data = weights.read_bytes()
    replaced = 0
    for tensor in proto.graph.initializer:
        content = onnx.numpy_helper.to_array(tensor).tobytes()
        if tensor.name not in index:
            continue
        begin, end = (start + offset for offset in index[tensor.name]["data_offsets"])
        if content != data[begin:end]:
            raise ValueError(f"initializer '{tensor.name}' is not what {weights.name} holds")
        if len(content) <= INLINE_BYTES:
            continue
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", weights.name), ("offset", begin), ("length", len(content))):
            tensor.external_data.add(key=key, value=str(value))
        replaced += 1
    return replaced


def export(variant: str, folder: Path = HERE) -> onnx.ModelProto:
    """Exports a trained model; writes ``VARIANT.onnx`` beside its weights and returns the graph."""
    proto = export_graph(load_model(variant, folder))
    replaced = refer_to_weights(proto, folder / f"{variant}.safetensors")
    out = folder / f"{variant}.onnx"
    out.write_bytes(proto.SerializeToString(deterministic=True))
    print(
        f"{out}: {len(proto.graph.node)} nodes, {out.stat().st_size:,} bytes,"
        f" {replaced} weights in {variant}.safetensors"
    )
    return proto


def _strip(proto: onnx.ModelProto) -> None:
    """Removes stack traces and other notes of the exporting machine."""
    graph = proto.graph
    proto.producer_version = proto.producer_version.partition("+")[0]  # without "+cpu", "+cu130"
    for item in (proto, graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        del item.metadata_props[:]
        item.doc_string = ""
    for tensor in graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
    if proto.functions:
        raise RuntimeError("the exported graph has local functions, which are not expected here")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("--folder", type=Path, default=HERE, help="holds the weights and record")
    arguments = parser.parse_args()
    export(arguments.variant, arguments.folder)


if __name__ == "__main__":
    main()
