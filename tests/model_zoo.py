"""Tiny MoE models with random weights, from transformers' own configurations, and their exports.

``make(family)`` gives a model and inputs for it; ``export(family, exporter)`` the graph's path;
``expected(family)`` PyTorch's outputs. All are made once a session, a graph once for all workers of
pytest. To add a model, add an entry to :data:`FAMILIES`; to add a way to export, one to
:data:`EXPORTERS`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import shared_files

VOCAB = 64
BATCH, SEQ = 2, 7

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Family:
    """A model that transformers has."""

    config: str
    """Name of the configuration class."""
    model: str
    """Name of the model class."""
    moe_layers: int
    sizes: dict[str, Any] = field(default_factory=dict)
    """Arguments of the configuration beside the common ones."""
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    dtype: str = "float32"


def _causal(name: str, moe_layers: int = 2, **sizes: Any) -> Family:
    return Family(f"{name}Config", f"{name}ForCausalLM", moe_layers, {**_SIZES, **sizes})


FAMILIES: dict[str, Family] = {
    "Mixtral": _causal("Mixtral", num_local_experts=4),
    # One whose intermediate size is the hidden size: no shape tells the experts' axes apart.
    "Mixtral-square": _causal("Mixtral", num_local_experts=4, intermediate_size=32),
    "Qwen2-MoE": _causal(
        "Qwen2Moe",
        num_experts=6,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        norm_topk_prob=False,
    ),
    "Qwen3-MoE": _causal(
        "Qwen3Moe", num_experts=8, moe_intermediate_size=24, head_dim=8, norm_topk_prob=True
    ),
    "OLMoE": _causal("Olmoe", num_experts=6, norm_topk_prob=False),
    "gpt-oss": _causal("GptOss", num_local_experts=4, head_dim=8, sliding_window=4),
    "DeepSeek-V3": _causal(
        "DeepseekV3",
        moe_layers=2,
        num_hidden_layers=3,
        num_key_value_heads=4,
        first_k_dense_replace=1,
        moe_intermediate_size=24,
        n_routed_experts=8,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=3,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ),
    "Granite-MoE": _causal("GraniteMoe", num_local_experts=4, residual_multiplier=0.7),
    "Phi-MoE": _causal("Phimoe", num_local_experts=6, router_jitter_noise=0.1),
    "JetMoE": _causal("JetMoe", num_local_experts=4, kv_channels=8, activation_function="silu"),
}


@dataclass(frozen=True)
class Made:
    """A model and inputs for it."""

    family: str
    model: Any
    inputs: dict[str, torch.Tensor]
    """Token numbers and masks of (batch, seq)."""
    experts: dict[str, str | None] | None
    """The model's own choice of how to compute experts; None: it knows one way only."""

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The inputs as NumPy arrays."""
        return {name: value.numpy() for name, value in self.inputs.items()}


@functools.cache
def make(family: str) -> Made:
    """The family's tiny model, in evaluation mode, and inputs."""
    entry = FAMILIES[family]
    config = getattr(transformers, entry.config)(**entry.sizes)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = getattr(transformers, entry.model)(config).to(getattr(torch, entry.dtype)).eval()
        _randomise(model)
        ids = {
            name: torch.randint(3, VOCAB, (BATCH, SEQ)) if name.endswith("ids") else None
            for name in entry.inputs
        }
    inputs = {
        name: torch.ones((BATCH, SEQ), dtype=torch.int64) if value is None else value
        for name, value in ids.items()
    }
    several = getattr(model, "_can_set_experts_implementation", lambda: False)()
    return Made(family, model, inputs, model.get_experts_implementation() if several else None)


def _randomise(model: torch.nn.Module) -> None:
    """Weights with which every part of the model matters, biases and norms included.

    The models' own initialisation is so small that an expert could be left out within 1e-4, and
    leaves biases at zero.
    """
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if not value.is_floating_point() or "inv_freq" in name:
                continue
            if value.dim() >= 2 and not name.endswith("bias"):
                value.normal_(0, 1.2 / min(value.shape[-2:]) ** 0.5)
            elif name.endswith("weight"):
                value.normal_(1, 0.2)
            else:
                value.normal_(0, 0.3)


@functools.cache
def expected(family: str) -> np.ndarray:
    """PyTorch's logits (batch, seq, vocabulary), with transformers' own experts, one at a time."""
    made = make(family)
    _set_experts(made, "eager")
    with torch.no_grad():
        return made.model(**made.inputs, use_cache=False).logits.numpy()


@functools.cache
def export(family: str, exporter: str) -> Path:
    """The family's graph as an exporter writes it, with symbolic batch and seq.

    Raises:
        Exception: whatever the exporter raises; it is raised again by each call.
    """
    path = shared_files.folder() / "zoo" / f"{family}-{exporter}" / "model.onnx"
    with shared_files.alone(path.parent):
        if not path.parent.exists():
            with tempfile.TemporaryDirectory(dir=path.parent.parent) as unfinished:
                made = Path(unfinished) / "whole"
                made.mkdir()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    EXPORTERS[exporter](make(family), made / path.name)
                made.rename(path.parent)
    return path


class _Logits(torch.nn.Module):
    """The model with positional inputs and the logits alone as output."""

    def __init__(self, made: Made) -> None:
        super().__init__()
        self.model = made.model
        self.names = list(made.inputs)
        self.eval()  # the exporters would give the model the mode of this module

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, values, strict=True)), use_cache=False).logits


def _set_experts(made: Made, implementation: str | None) -> None:
    """Sets how experts are computed, if the model knows several ways; None: its own choice."""
    if made.experts is not None:
        made.model.set_experts_implementation(implementation or made.experts)


def _dynamo(made: Made, path: Path) -> None:
    _set_experts(made, "batched_mm")
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")}
    program = torch.onnx.export(
        _Logits(made),
        tuple(made.inputs.values()),
        dynamo=True,
        input_names=list(made.inputs),
        output_names=["logits"],
        dynamic_shapes=(tuple(dims for _ in made.inputs),),
        verbose=False,
    )
    assert program is not None
    program.save(os.fspath(path))


def _torchscript(made: Made, path: Path) -> None:
    _set_experts(made, "batched_mm")
    torch.onnx.export(
        _Logits(made),
        tuple(made.inputs.values()),
        os.fspath(path),
        dynamo=False,
        input_names=list(made.inputs),
        output_names=["logits"],
        dynamic_axes={name: {0: "batch", 1: "seq"} for name in (*made.inputs, "logits")},
        opset_version=18,
    )


def _onnx_exporter(fusions: str | None) -> Callable[[Made, Path], None]:
    def run(made: Made, path: Path) -> None:
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        _set_experts(made, None)
        # Older releases do not know the argument, see :func:`unavailable`.
        config = OnnxConfig(dynamic=True, **({"ort_fusions": fusions} if fusions else {}))
        inputs = {**made.inputs, "use_cache": False}
        save(OnnxExporter().export(made.model, inputs, config=config), path)

    return run


def save(exported: Any, path: Path) -> None:
    """Writes what transformers' OnnxExporter returns, in older releases an ``ONNXProgram``."""
    if hasattr(exported, "save_pretrained"):
        exported.save_pretrained(path.parent)
    else:
        exported.save(os.fspath(path))
    assert path.exists(), list(path.parent.iterdir())


def unavailable(exporter: str) -> str:
    """Why the installed transformers has no such exporter; empty when it has."""
    if not exporter.startswith("transformers"):
        return ""
    try:
        from transformers.exporters.exporter_onnx import OnnxConfig
    except ImportError as error:
        return f"transformers {transformers.__version__} has no OnnxExporter ({error})"
    known = {entry.name for entry in dataclasses.fields(OnnxConfig)}
    if exporter == "transformers-cuda" and "ort_fusions" not in known:
        return f"OnnxConfig of transformers {transformers.__version__} has no ort_fusions"
    return ""


EXPORTERS: dict[str, Callable[[Made, Path], None]] = {
    "dynamo": _dynamo,
    "torchscript": _torchscript,
    "transformers": _onnx_exporter(None),
    "transformers-cuda": _onnx_exporter("cuda"),
}
"""How a graph is made: torch's exporters, with each token's chosen experts by one batched product
(``experts_implementation="batched_mm"``), and transformers' own, plain and with ONNX Runtime's
operators for CUDA."""
