"""Decoders of real models' shapes with random bfloat16 weights, through MoELayer and a session."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

import moe_infer.torch

OPSET = 20
"""The newest that TensorRT 10 reads in full."""
LAYERS, VOCAB = 4, 1024
BATCH, SEQ = 2, 64

MATTERS = 0.5
LARGEST_DIFFERENCE, MOST_OF_EAGER = 0.1, 1.5
LEAST_SAME_CHOICE = 0.85
"""See :meth:`Closeness.check`."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Shape:
    """A model of transformers.

    Attributes:
        config: name of the configuration class.
        model: name of the model class.
        sizes: arguments of the configuration.
    """

    config: str
    model: str
    sizes: dict[str, Any] = field(default_factory=dict)


SHAPES = {
    "Mixtral-8x7B": Shape(
        "MixtralConfig",
        "MixtralForCausalLM",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
    "Qwen3-30B-A3B": Shape(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
        },
    ),
}
"""Of their four layers each has an attention and a MoE block, as in the whole model."""


@dataclass(frozen=True)
class References:
    """The same weights and tokens in PyTorch; logits (batch, seq, vocabulary) in float32.

    Attributes:
        exact: in float32.
        eager: in bfloat16.
        without_experts: in bfloat16, the MoE blocks' outputs zeroed.
    """

    exact: Array
    eager: Array
    without_experts: Array


class TokenLogits(torch.nn.Module):
    """Token numbers to logits in float32: ONNX Runtime gives bfloat16 to NumPy in no one way."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return output.logits.float()


def make(shape: Shape, device: str, **sizes: Any) -> Any:
    """The model with random bfloat16 weights, in evaluation mode.

    Args:
        shape: see :data:`SHAPES`.
        device: where the weights are made.
        sizes: other arguments of the configuration, for small models.
    """
    common = {
        "vocab_size": VOCAB,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": 4096,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = getattr(transformers, shape.config)(**{**common, **shape.sizes, **sizes})
    with torch.device(device):
        model = getattr(transformers, shape.model)._from_config(
            config, dtype=torch.bfloat16, attn_implementation="eager"
        )
    model = model.to(device).eval()
    # One expert after the other: grouped products are there for some types and GPUs only.
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation("eager")
    randomise(model, device)
    return model


def randomise(model: Any, device: str) -> None:
    """Weights with which the hidden states keep their size and every part matters."""
    generator = torch.Generator(device).manual_seed(3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 1:
                value.normal_(1, 0.1, generator=generator)
                continue
            gain = 1.0
            if name.endswith("gate.weight"):
                gain = 3.0  # a router that is sure of some tokens
            elif name.endswith("down_proj"):
                gain = 2.0  # what the activation took away
            fan_in = 1 if "embed" in name else value.shape[-1]
            value.normal_(0, gain / fan_in**0.5, generator=generator)


def make_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Token numbers and a mask of ones (batch, seq)."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, model.config.vocab_size, (BATCH, SEQ), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def references(model: Any, inputs: dict[str, torch.Tensor]) -> References:
    """What transformers computes on the model's device; it needs room for float32 weights."""
    network = TokenLogits(model)
    on_device = [value.to(model.device) for value in inputs.values()]
    with torch.no_grad():
        eager = network(*on_device).cpu().numpy()
        without = _without_experts(network, on_device)
        return References(_in_float32(network, on_device), eager, without)


def export(model: Any, inputs: dict[str, torch.Tensor], folder: Path) -> Path:
    """Writes experts and graph; the model loses its experts, the rest of it goes to the CPU."""
    report = moe_infer.torch.replace_moe(
        model, folder / "experts.safetensors", check_modules=False, progress=False
    )
    assert len(report.layers) == model.config.num_hidden_layers, str(report)
    network = TokenLogits(model).to("cpu")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    dims = {0: "batch", 1: "seq"}
    path = folder / "model.onnx"
    moe_infer.torch.export(
        network,
        tuple(value[:, :8] for value in inputs.values()),
        path,
        input_names=list(inputs),
        output_names=["logits"],
        dynamic_shapes=(dims, dims),
        opset_version=OPSET,
    )
    return path


def _in_float32(network: TokenLogits, inputs: list[torch.Tensor]) -> Array:
    """Logits with every parameter widened, which loses nothing on the way back."""
    _cast(network, torch.float32)
    found: Array = network(*inputs).cpu().numpy()
    _cast(network, torch.bfloat16)
    return found


def _cast(network: TokenLogits, dtype: torch.dtype) -> None:
    # Parameters alone: the positions' frequencies are float32 in either case.
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)


def _without_experts(network: TokenLogits, inputs: list[torch.Tensor]) -> Array:
    def zero(module: Any, given: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    blocks = [m for m in network.modules() if hasattr(m, "experts")]
    assert len(blocks) == network.model.config.num_hidden_layers
    hooks = [block.register_forward_hook(zero) for block in blocks]
    found: Array = network(*inputs).cpu().numpy()
    for hook in hooks:
        hook.remove()
    return found


class Closeness(NamedTuple):
    """How far a graph's logits are from PyTorch's; norms as shares of the expected norm.

    Attributes:
        to_eager: norm of the difference to bfloat16.
        to_exact: norm of the difference to float32.
        eager_to_exact: norm of PyTorch's own, between both.
        same_choice: share of the tokens whose largest logit is that of bfloat16.
        experts: norm of what the MoE blocks change.
    """

    to_eager: float
    to_exact: float
    eager_to_exact: float
    same_choice: float
    experts: float

    def check(self) -> None:
        """Raises AssertionError with all numbers if one of them is out of its bounds.

        A score that is equal in bfloat16 may go to another expert, which changes a token by much
        more than rounding does; hence norms over all tokens, and the error to float32 next to
        transformers' own. Small models of this kind are at 0.04 and 0.95, by the CPU provider.
        """
        assert self.experts > MATTERS, self
        assert self.to_eager <= LARGEST_DIFFERENCE, self
        assert self.to_exact <= MOST_OF_EAGER * self.eager_to_exact, self
        assert self.same_choice >= LEAST_SAME_CHOICE, self


def closeness(found: Array, expected: References) -> Closeness:
    """Of a graph's logits."""
    assert found.shape == expected.eager.shape
    assert np.isfinite(found).all()
    return Closeness(
        _relative(found, expected.eager),
        _relative(found, expected.exact),
        _relative(expected.eager, expected.exact),
        float((found.argmax(-1) == expected.eager.argmax(-1)).mean()),
        _relative(expected.without_experts, expected.eager),
    )


def _relative(found: Array, expected: Array) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
