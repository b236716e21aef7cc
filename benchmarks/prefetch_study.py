"""How well a layer's experts can be guessed one layer earlier.

    python -m examples.tiny_moe.corpus            # the text
    python benchmarks/prefetch_study.py

A fetch could begin while the layer before still runs if somebody knew which experts come next. The
guess studied here costs one small product: the next layer's router, applied to this layer's hidden
states. On the repository's trained models and text that they were not trained on; beside it what
needs no router: the experts that the token before chose, and those that are chosen most. Runs on
the CPU; writes benchmarks/results/prefetch_study.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import record_traces
from moe_bench.guesses import best, recall
from moe_bench.report import markdown_table
from onnx import helper, numpy_helper

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import moe_infer  # noqa: E402
from examples.tiny_moe import corpus  # noqa: E402
from moe_infer.graph.lower_nodes import LayerNode, load_model, read_layers  # noqa: E402

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Layer:
    """What a layer saw and chose.

    Attributes:
        name: the node's.
        top_k: experts a token.
        router: (d_model, experts).
        hidden: (tokens, d_model), the layer's input.
        chosen: (tokens, top_k).
    """

    name: str
    top_k: int
    router: Array
    hidden: Array
    chosen: Array


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=corpus.DEFAULT_PATH)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args()
    tokens = record_traces.sequences(options.corpus, options.sequences)
    rows = []
    for name in record_traces.MODELS:
        layers = run(ROOT / f"examples/tiny_moe/{name}.onnx", tokens)
        rows += [{"model": name, **row} for row in study(layers)]
    print(table(rows))
    record = {"sequences": options.sequences, "context": record_traces.CONTEXT, "pairs": rows}
    (options.out / "prefetch_study.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


def run(exported: Path, tokens: Sequence[Array]) -> list[list[Layer]]:
    """Layers of each sequence."""
    with tempfile.TemporaryDirectory() as folder:
        moe_infer.rewrite(exported, folder)
        path = Path(folder) / "model.onnx"
        model, base = load_model(path)
        layers = read_layers(model, base)
        routers = [router_of(model, base, layer) for layer in layers]
        lowered = moe_infer.lower(path, Path(folder) / "lowered.onnx")
        taps = [name for layer in layers for name in (layer.hidden_states, scores_of(layer))]
        lowered.graph.output.extend(
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in taps
        )
        onnx.save(lowered, Path(folder) / "tapped.onnx")
        session = ort.InferenceSession(
            Path(folder) / "tapped.onnx", providers=["CPUExecutionProvider"]
        )
        return [
            [
                layer_of(layer, router, *values[2 * i : 2 * i + 2])
                for i, (layer, router) in enumerate(zip(layers, routers, strict=True))
            ]
            for values in (session.run(taps, {"tokens": given}) for given in tokens)
        ]


def scores_of(layer: LayerNode) -> str:
    """The layer's router logits, which the models of this study all have."""
    if layer.router_logits is None:
        raise ValueError(f"{layer.name} has no router_logits")
    return layer.router_logits


def router_of(model: onnx.ModelProto, base: Path | None, layer: LayerNode) -> Array:
    """(d_model, experts): the constant that makes the logits of the hidden states."""
    producer = next(n for n in model.graph.node if scores_of(layer) in n.output)
    if producer.op_type not in ("MatMul", "Gemm") or producer.input[0] != layer.hidden_states:
        raise ValueError(f"{layer.name}: the logits come from {producer.op_type}")
    tensor = next(t for t in model.graph.initializer if t.name == producer.input[1])
    weight = numpy_helper.to_array(tensor, str(base or "."))
    turned = any(a.name == "transB" and a.i for a in producer.attribute)
    return weight.T if turned else weight


def layer_of(layer: LayerNode, router: Array, hidden: Array, logits: Array) -> Layer:
    """One sequence's values of a layer."""
    top_k = layer.config.top_k
    flat = logits.reshape(-1, logits.shape[-1])
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return Layer(layer.name, top_k, router, hidden, best(flat, top_k))


def study(sequences: Sequence[Sequence[Layer]]) -> list[dict[str, Any]]:
    """For each pair of layers, the part of the second one's experts that is guessed."""
    rows = []
    for i in range(len(sequences[0]) - 1):
        before = [layers[i] for layers in sequences]
        after = [layers[i + 1] for layers in sequences]
        top_k, experts = after[0].top_k, after[0].router.shape[1]
        chosen = np.concatenate([layer.chosen for layer in after])
        found: dict[str, float] = {}
        for more in (0, 1, 2):
            guess = np.concatenate(
                [best(layer.hidden @ after[0].router, top_k + more) for layer in before]
            )
            found[f"router + {more}"] = recall(guess, chosen)
        last = np.concatenate([np.roll(layer.chosen, 1, axis=0)[1:] for layer in after])
        rest = np.concatenate([layer.chosen[1:] for layer in after])
        found["token before"] = recall(last, rest)
        popular = np.argsort(-np.bincount(chosen.ravel(), minlength=experts), kind="stable")
        found["chosen most"] = recall(np.tile(popular[:top_k], (len(chosen), 1)), chosen)
        rows.append(
            {
                "from": before[0].name,
                "to": after[0].name,
                "top_k": top_k,
                "chance": top_k / experts,
                **found,
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; also the one in docs/scheduling.md."""
    names = ("router + 0", "router + 1", "router + 2", "token before", "chosen most", "chance")
    lines = []
    for row in rows:
        pair = f"{row['from'].split('.')[-1]} to {row['to'].split('.')[-1]}"
        figures = [f"{100 * row[name]:.1f}" for name in names]
        lines.append([row["model"], pair, str(row["top_k"]), *figures])
    return markdown_table(["model", "layers", "top-k", *names], lines, texts=2)


if __name__ == "__main__":
    sys.exit(main())
