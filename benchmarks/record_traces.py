"""Records what the trained example's tokens choose on real text.

    python -m examples.tiny_moe.corpus            # the text
    python benchmarks/record_traces.py

The text is the validation part of the example's corpus, which the models were not trained on. Each
sequence is a whole context, from another place of the text; the model runs on the CPU. The traces
go to benchmarks/traces/ and are committed, so that who uses them needs neither text nor models.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import moe_infer
from examples.tiny_moe import corpus
from examples.tiny_moe.tokenizer import Tokenizer
from moe_infer.simulate import record

ROOT = Path(__file__).resolve().parent.parent

MODELS = ("t5_top1", "gated_top2")
CONTEXT = 256


def sequences(path: Path, count: int) -> list[np.ndarray]:
    """Tokens (1, CONTEXT) from ``count`` places of the corpus's validation part."""
    text = corpus.split(corpus.read(path))[1]
    ids = Tokenizer.load().encode(text)
    starts = np.linspace(0, len(ids) - CONTEXT, count).astype(int)
    return [np.array([ids[start : start + CONTEXT]]) for start in starts]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=corpus.DEFAULT_PATH)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/traces")
    options = parser.parse_args()
    tokens = sequences(options.corpus, options.sequences)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            moe_infer.rewrite(ROOT / f"examples/tiny_moe/{name}.onnx", folder)
            trace = record(
                Path(folder) / "model.onnx",
                [{"tokens": given} for given in tokens],
                f"examples/tiny_moe/{name} on its validation text (King James Bible,"
                f" {len(tokens)} places)",
            )
        path = options.out / f"{name}.npz"
        trace.save(path)
        print(f"{path}: {path.stat().st_size} bytes, choices {trace.choices.shape}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
