"""Trains one of the two models; about four minutes on one H200.

    python -m examples.tiny_moe.train t5_top1 --out examples/tiny_moe
    python -m examples.tiny_moe.train gated_top2 --out examples/tiny_moe

Needs PyTorch and build/corpus/kjv.txt (``python -m examples.tiny_moe.corpus``). Writes
``VARIANT.safetensors`` (float16, the best checkpoint on the validation text) and the record of the
run, ``VARIANT.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from examples.tiny_moe import corpus
from examples.tiny_moe.model import LanguageModel, ModelConfig
from examples.tiny_moe.tokenizer import Tokenizer

BALANCE_WEIGHT = 0.01
AVERAGE_DECAY = 0.999
"""Of the exponential moving average of the weights, which is what is validated and kept."""
PROMPT = "Genesis 1\nIn the beginning"


def unigram_loss(train: list[int], validation: list[int], vocabulary: int) -> float:
    """Nats a token of a model that knows only how frequent each token is (add-one smoothing)."""
    counts = Counter(train)
    total = len(train) + vocabulary
    return -sum(math.log((counts[i] + 1) / total) for i in validation) / len(validation)


@torch.no_grad()
def validation_loss(model: LanguageModel, tokens: Tensor, context: int, limit: int) -> float:
    """Nats a token over the whole text, in windows of ``context`` that do not overlap."""
    windows = min((len(tokens) - 1) // context, limit)
    x = tokens[: windows * context].view(windows, context)
    y = tokens[1 : windows * context + 1].view(windows, context)
    model.eval()
    total = 0.0
    for a, b in zip(x.split(8), y.split(8), strict=True):
        logits = model(a)
        total += functional.cross_entropy(logits.flatten(0, 1), b.flatten(), reduction="sum").item()
    model.train()
    return total / y.numel()


@torch.no_grad()
def sample(model: LanguageModel, tokenizer: Tokenizer, prompt: str, count: int, seed: int) -> str:
    """``prompt`` and ``count`` more tokens, at temperature 0.8."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt)
    model.eval()
    for _ in range(count):
        context = torch.tensor([ids[-model.config.context :]], device=device)
        probability = torch.softmax(model(context)[0, -1].float().cpu() / 0.8, -1)
        ids.append(int(torch.multinomial(probability, 1, generator=generator)))
    model.train()
    return tokenizer.decode(ids)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then cosine down to 2 % of the peak."""
    warmup = min(400, steps // 10 + 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(args: argparse.Namespace) -> None:
    """Trains, validates, and writes weights and record into ``args.out``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = Tokenizer.load()
    train_text, validation_text = corpus.split(corpus.read(args.corpus))
    train_ids, validation_ids = tokenizer.encode(train_text), tokenizer.encode(validation_text)
    unigram = unigram_loss(train_ids, validation_ids, len(tokenizer))
    characters = len(validation_text) / len(validation_ids)
    print(
        f"{len(train_ids):,} training tokens, {len(validation_ids):,} validation tokens,"
        f" {characters:.2f} characters a token; unigram loss {unigram:.4f}",
        flush=True,
    )
    data = torch.tensor(train_ids, device=device)
    validation_data = torch.tensor(validation_ids, device=device)

    config = ModelConfig(args.variant, vocabulary=len(tokenizer), dropout=args.dropout)
    model = LanguageModel(config).to(device)
    average = copy.deepcopy(model)
    parameters = sum(p.numel() for p in model.parameters())
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": args.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    steps = args.steps or int(args.epochs * len(data) / (args.batch * config.context))
    print(f"{args.variant}: {parameters:,} parameters, {steps} steps on {device}", flush=True)

    offsets = torch.arange(config.context, device=device)
    curve: list[dict[str, float]] = []
    best: dict[str, Any] = {"validation_loss": math.inf}
    running, started = torch.zeros((), device=device), time.monotonic()
    since = 0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.learning_rate)
        start = torch.randint(len(data) - config.context - 1, (args.batch, 1), device=device)
        place = start + offsets
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(data[place])
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), data[place + 1].flatten())
            total = loss + BALANCE_WEIGHT * model.balance_loss()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(AVERAGE_DECAY, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        running += loss.detach()
        since += 1

        minutes = (time.monotonic() - started) / 60
        out_of_time = minutes > args.minutes
        if (step + 1) % args.interval and step + 1 != steps and not out_of_time:
            continue
        value = validation_loss(average, validation_data, config.context, args.validation_windows)
        curve.append(
            {
                "step": step + 1,
                "epoch": round((step + 1) * args.batch * config.context / len(data), 2),
                "minutes": round(minutes, 3),
                "training_loss": round(running.item() / since, 4),
                "validation_loss": round(value, 4),
                "balance": round(model.balance_loss().item(), 3),
            }
        )
        print("  ".join(f"{k} {v}" for k, v in curve[-1].items()), flush=True)
        running.zero_()
        since = 0
        if value < best["validation_loss"]:
            state = {k: v.detach().half().cpu() for k, v in average.state_dict().items()}
            best = {"validation_loss": value, "step": step + 1, "state": state}
        if out_of_time:
            print(f"stopped after {args.minutes} minutes, step {step + 1} of {steps}")
            break

    average.load_state_dict({k: v.to(device) for k, v in best["state"].items()})
    final = validation_loss(average, validation_data, config.context, args.validation_windows)
    text = sample(average, tokenizer, PROMPT, 200, args.seed)
    print(
        f"validation loss {final:.4f} nats a token ({final / characters / math.log(2):.3f} bits a"
        f" character) at step {best['step']}; unigram model {unigram:.4f}\n{text}"
    )
    record = {
        "model": config.to_dict(),
        "parameters": parameters,
        "validation_loss": round(final, 4),
        "validation_bits_per_character": round(final / characters / math.log(2), 4),
        "unigram_validation_loss": round(unigram, 4),
        "best_step": best["step"],
        "loss_unit": "nats a token; validation on the averaged weights, at the end as float16",
        "data": {
            "source": corpus.SOURCE,
            "sha256": corpus.SHA256,
            "validation": "the last 5 % of the text, from a chapter's heading on",
            "training_tokens": len(train_ids),
            "validation_tokens": len(validation_ids),
        },
        "training": {
            "seed": args.seed,
            "steps": steps,
            "steps_done": curve[-1]["step"],
            "batch": args.batch,
            "learning_rate": args.learning_rate,
            "weight_decay": args.weight_decay,
            "average_decay": AVERAGE_DECAY,
            "balance_weight": BALANCE_WEIGHT,
            "minutes": round((time.monotonic() - started) / 60, 2),
        },
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "sample": text,
        "curve": curve,
    }
    write(args.out / args.variant, best["state"], record)


def write(stem: Path, state: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Writes the weights to ``stem``.safetensors and the record to ``stem``.json.

    Safetensors is a header's length (8 bytes), the header (JSON) and the tensors one after another;
    written here so that training needs PyTorch and nothing else.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in state.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    index = json.dumps(header, separators=(",", ":")).encode()
    index += b" " * (-len(index) % 8)
    stem.parent.mkdir(parents=True, exist_ok=True)
    with open(stem.with_suffix(".safetensors"), "wb") as file:
        file.write(len(index).to_bytes(8, "little") + index)
        for tensor in state.values():
            file.write(tensor.contiguous().numpy().tobytes())
    text = json.dumps(record, indent=1) + "\n"
    stem.with_suffix(".json").write_text(text, encoding="utf-8")
    print(f"wrote {stem}.safetensors and {stem}.json")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", choices=("t5_top1", "gated_top2"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.0, help="stop after this many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, default=corpus.DEFAULT_PATH)
    parser.add_argument("--epochs", type=float, default=45.0)
    parser.add_argument("--steps", type=int, default=0, help="instead of --epochs")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.15)
    parser.add_argument("--interval", type=int, default=500, help="steps between validations")
    parser.add_argument("--validation-windows", type=int, default=1 << 30)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
