"""Rewrites the exported graphs of the trained example, runs them and compares with the originals.

    python examples/demo.py                       # both models; needs no PyTorch
    python examples/demo.py gated_top2 --prompt "Genesis 1"

For each model: the graph that torch.onnx exported goes through ``moe_infer.rewrite``, the result
through ``moe_infer.InferenceSession`` (TensorRT where it can run, else ONNX Runtime's CUDA or CPU
provider), which continues a prompt. At the end the logits are compared with those of the
unrewritten graph; the exit code is 1 if they differ by 1e-3 or more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

# Logits of two runtimes are compared to 1e-3: TF32 would round the factors to 10 bits.
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import onnxruntime as ort
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import moe_infer
from examples.tiny_moe.tokenizer import Tokenizer
from moe_infer.runtime.expert_use import count_expert_use

HERE = Path(__file__).resolve().parent / "tiny_moe"
VARIANTS = ("t5_top1", "gated_top2")
CONTEXT = 256
ALLOWED_DIFFERENCE = 1e-3


def softmax(logits: np.ndarray) -> np.ndarray:
    """In float64, over the only axis."""
    values = np.exp(logits.astype(np.float64) - logits.max())
    return values / values.sum()


def generate(
    session: ort.InferenceSession,
    prompt: list[int],
    count: int,
    temperature: float,
    seed: int,
    console: Console,
) -> tuple[list[int], float]:
    """``prompt`` and ``count`` more token ids, and the seconds it took.

    Temperature 0 takes the likeliest token each time.
    """
    random = np.random.default_rng(seed)
    ids = list(prompt)
    bar = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn())
    start = time.perf_counter()
    with Progress(
        *bar, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        for _ in progress.track(range(count), description="tokens"):
            logits = session.run(["logits"], {"tokens": np.array([ids[-CONTEXT:]])})[0][0, -1]
            if temperature > 0:
                ids.append(int(random.choice(len(logits), p=softmax(logits / temperature))))
            else:
                ids.append(int(logits.argmax()))
    return ids, time.perf_counter() - start


def open_original(path: Path) -> ort.InferenceSession:
    """The unrewritten graph on CUDA where there is a GPU, else on the CPU."""
    providers: list[object] = ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" in ort.get_available_providers() and os.path.exists(
        "/dev/nvidiactl"
    ):
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": 0}))
    return ort.InferenceSession(path, providers=providers)


def nodes_by_provider(session: ort.InferenceSession) -> Counter[str]:
    """What ran until now, by provider; a TensorRT engine is one node. Ends the profiling."""
    path = Path(session.end_profiling())
    events = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    names = {
        (event["args"]["provider"], event["name"])
        for event in events
        if event["cat"] == "Node" and event.get("args", {}).get("provider")
    }
    return Counter(provider for provider, _ in names)


def demonstrate(variant: str, arguments: argparse.Namespace, console: Console) -> float:
    """One model from its exported graph to text; returns the largest difference of the logits."""
    console.rule(f"[bold]{variant}")
    graph, out = HERE / f"{variant}.onnx", arguments.out / variant
    with console.status("rewriting"):
        report = moe_infer.rewrite(graph, out)
    console.print(f"rewritten: {graph.name} -> {out / 'model.onnx'}", highlight=False)
    console.print(escape(str(report)), highlight=False)

    with console.status("creating the session (with TensorRT: building the engine)"):
        started = time.perf_counter()
        options = ort.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(out / "profile")
        session = moe_infer.InferenceSession(
            out / "model.onnx",
            options,
            input_shapes={"tokens": ((1, 1), (1, CONTEXT // 2), (1, CONTEXT))},
        )
        opening = time.perf_counter() - started
    tokenizer = Tokenizer.load()
    prompt = tokenizer.encode(arguments.prompt)
    generate(session, prompt, 2, 0, 0, console)  # the first runs allocate
    nodes = nodes_by_provider(session)
    sampled, seconds = generate(
        session, prompt, arguments.tokens, arguments.temperature, arguments.seed, console
    )
    greedy, _ = generate(session, prompt, min(32, arguments.tokens), 0, 0, console)

    continuation = escape(tokenizer.decode(sampled[len(prompt) :]))
    console.print(f"\n[bold]{escape(arguments.prompt)}[/]{continuation}\n", highlight=False)
    console.print(f"[dim]likeliest: {escape(tokenizer.decode(greedy))!r}[/]", highlight=False)

    window = np.array([sampled[-CONTEXT:]])
    original = open_original(graph)
    difference = float(
        np.abs(
            session.run(["logits"], {"tokens": window})[0]
            - original.run(["logits"], {"tokens": window})[0]
        ).max()
    )

    table = Table(title=f"{variant}: experts used for these {window.shape[1]} tokens")
    for heading in ("layer", "experts used", "tokens of each expert"):
        table.add_column(heading)
    for use in count_expert_use(out / "model.onnx", {"tokens": window}):
        table.add_row(
            use.layer,
            f"{np.count_nonzero(use.tokens)} of {len(use.tokens)}",
            " ".join(map(str, use.tokens)),
        )
    console.print(table)
    console.print(f"{arguments.tokens / seconds:.1f} tokens a second", highlight=False)
    engines = nodes.pop("TensorrtExecutionProvider", 0)
    ran = [f"{engines} TensorRT engine{'s' * (engines != 1)}"] if engines else []
    ran += [f"{count} operators on {name}" for name, count in nodes.most_common()]
    console.print(f"provider: {session.moe_provider}; {', '.join(ran)}", highlight=False)
    console.print(f"session ready in {opening:.1f} s", highlight=False)
    console.print(
        f"largest difference from the unrewritten graph ({original.get_providers()[0]}):"
        f" {difference:.2e}",
        highlight=False,
    )
    return difference


def main() -> int:
    """Command line; 1 if a rewritten graph computes something else than the original."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", metavar="model", help=" or ".join(VARIANTS))
    parser.add_argument("--prompt", default="Psalm 151\nO LORD")
    parser.add_argument("--tokens", type=int, default=120, help="to add to the prompt")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    arguments = parser.parse_args()
    for variant in arguments.variants:
        if variant not in VARIANTS:
            parser.error(f"unknown model '{variant}'; there are {' and '.join(VARIANTS)}")
    if arguments.tokens < 1:
        parser.error(f"--tokens must be at least 1, got {arguments.tokens}")
    ort.set_default_logger_severity(3)  # errors; the session's own notes come through logging
    console = Console()
    failed = []
    for variant in arguments.variants or VARIANTS:
        difference = demonstrate(variant, arguments, console)
        if not difference < ALLOWED_DIFFERENCE:
            failed.append(variant)
    if failed:
        console.print(f"[red]not below {ALLOWED_DIFFERENCE}: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
