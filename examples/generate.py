"""Generates text with a decoder graph whose MoE layers are MoELayer nodes.

    python examples/generate.py MODEL_DIR --prompt "In the beginning" --tokens 100
    python examples/generate.py MODEL_DIR --prompt "..." --temperature 0.8 --top-k 40 --top-p 0.95

MODEL_DIR holds ``model.onnx``, the experts and a tokenizer, as ``moe-infer export`` and
``moe-infer rewrite`` (beside a tokenizer) leave them. The cache stays on the device between the
tokens; TensorRT builds one engine for up to ``--context`` tokens and none while it generates.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import moe_infer
from examples.decoding.cache import Decoder
from examples.decoding.sampling import Sampler, Sampling

PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
}


def generate(
    decoder: Decoder,
    prompt: Sequence[int],
    count: int,
    sampling: Sampling,
    stop: Sequence[int] = (),
) -> Iterator[int]:
    """Up to ``count`` token ids after ``prompt``, each when it is chosen; ends at one of ``stop``.

    Raises:
        ValueError: the prompt is empty or does not fit the context.
    """
    sampler = Sampler(sampling)
    decoder.reset()
    logits = decoder.run(prompt)
    for i in range(count):
        token = sampler.choose(logits)
        yield token
        if token in stop or i + 1 == count or decoder.length == decoder.context:
            return
        logits = decoder.run([token])


def stream(tokens: Iterator[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """The text of tokens as they come; a character of several tokens comes when it is whole."""
    held: list[int] = []
    shown = ""
    for token in tokens:
        held.append(token)
        text = decode(held)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
    yield decode(held)[len(shown) :]


def stop_tokens(folder: Path) -> list[int]:
    """Ids that end a text, by the model's configuration.

    Raises:
        ValueError: a file of the configuration is damaged.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        try:
            found = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if found is not None:
            return list(found) if isinstance(found, list) else [found]
    return []


def parse_ids(text: str) -> list[int]:
    """Token ids with commas between them.

    Raises:
        ValueError: there is something else, or nothing.
    """
    try:
        return [int(i) for i in text.split(",")]
    except ValueError:
        raise ValueError(f"--ids must be token ids such as 3,17,5, got '{text}'") from None


def load_tokenizer(folder: Path) -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
    """Functions that encode and decode.

    Raises:
        FileNotFoundError: the folder has no tokenizer.json.
        ImportError: tokenizers is not installed.
        ValueError: the file is damaged.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(f"{error}; pip install tokenizers, or give --ids") from error
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; copy it from the model's folder, or give --ids"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"{path} is no tokenizer that can be read: {error}") from error
    return (lambda text: tokenizer.encode(text).ids), tokenizer.decode


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", help="text to continue")
    given.add_argument("--ids", help="token ids to continue, such as 3,17,5; prints ids")
    parser.add_argument("--tokens", type=int, default=100, help="most tokens to generate")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="0: all tokens")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--context", type=int, default=2048, help="most tokens in all")
    parser.add_argument("--provider", choices=sorted(PROVIDERS), help="the best by default")
    options = parser.parse_args(arguments)
    try:
        return run(options)
    except (ValueError, OSError, ImportError, moe_infer.PluginError) as error:
        print(f"generate: error: {error}", file=sys.stderr)
        return 1


def run(options: argparse.Namespace) -> int:
    """Loads, generates, and prints the text as it comes."""
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    if options.tokens < 1:
        raise ValueError(f"--tokens must be at least 1, got {options.tokens}")
    model = options.model_dir / "model.onnx"
    if not model.is_file():
        raise FileNotFoundError(f"{model} does not exist; expected what `moe-infer export` writes")
    stop = stop_tokens(options.model_dir)
    if options.ids is not None:
        prompt = parse_ids(options.ids)
    else:
        encode, decode = load_tokenizer(options.model_dir)
        prompt = encode(options.prompt)
    providers = PROVIDERS[options.provider] if options.provider else None
    started = time.perf_counter()
    decoder = Decoder(model, providers, options.context)
    loaded = time.perf_counter()
    made: list[int] = []
    times: list[float] = []

    def counted() -> Iterator[int]:
        for token in generate(decoder, prompt, options.tokens, sampling, stop):
            made.append(token)
            times.append(time.perf_counter())
            yield token

    if options.ids is not None:
        print(",".join(str(token) for token in counted()))
    else:
        print(options.prompt, end="", flush=True)
        for text in stream(counted(), decode):
            print(text, end="", flush=True)
        print()
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else float("nan")
    print(
        f"{decoder.session.moe_provider}: session {loaded - started:.2f} s, first token"
        f" {times[0] - loaded:.3f} s, then {rate:.1f} tokens a second, {len(made)} tokens",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    # Python's own exit is slow with large sessions alive, and nothing is left to be saved.
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
