"""What an expert computes and which tensors it has: the values of ``expert_sublayer_type``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ExpertTensor:
    """One tensor of an expert, in the layout in which the kernels read it.

    A file holds it either stacked over the experts, under ``name`` with shape
    (expert_count, *shape), or for each expert ``e`` as the parts ``e/PART``. With two parts the
    rows of the packed tensor alternate: row 2i is row i of the first part, row 2i+1 of the second.
    """

    name: str
    parts: tuple[str, ...]
    part_shape: tuple[Literal["hidden_size", "d_model"], ...]
    """Shape of each part; the packed tensor has len(parts) times as many rows."""

    def shape(self, d_model: int, hidden_size: int) -> tuple[int, ...]:
        """Packed shape for one expert."""
        rows, *rest = self.resolve_part_shape(d_model, hidden_size)
        return (rows * len(self.parts), *rest)

    def resolve_part_shape(self, d_model: int, hidden_size: int) -> tuple[int, ...]:
        """Shape of one part as a file with separate experts holds it."""
        sizes = {"d_model": d_model, "hidden_size": hidden_size}
        return tuple(sizes[s] for s in self.part_shape)


@dataclass(frozen=True)
class SubLayer:
    """What one expert computes."""

    name: str
    tensors: tuple[ExpertTensor, ...]
    meaning: str
    biases: tuple[ExpertTensor, ...] = ()
    """Tensors that an expert has beside ``tensors`` when ``expert_bias`` is 1."""
    activation_parameters: bool = False
    """True: it reads ``activation_alpha``, ``activation_beta`` and ``swiglu_limit``."""


_GATED = (
    ExpertTensor("gate_up", ("gate_weight", "up_weight"), ("hidden_size", "d_model")),
    ExpertTensor("down", ("down_weight",), ("d_model", "hidden_size")),
)
_GATED_BIASES = (
    ExpertTensor("gate_up_bias", ("gate_bias", "up_bias"), ("hidden_size",)),
    ExpertTensor("down_bias", ("down_bias",), ("d_model",)),
)
_PLAIN = (
    ExpertTensor("up", ("up_weight",), ("hidden_size", "d_model")),
    ExpertTensor("down", ("down_weight",), ("d_model", "hidden_size")),
)
_PLAIN_BIASES = (
    ExpertTensor("up_bias", ("up_bias",), ("hidden_size",)),
    ExpertTensor("down_bias", ("down_bias",), ("d_model",)),
)


def _gated(name: str, meaning: str, activation_parameters: bool = False) -> SubLayer:
    return SubLayer(name, _GATED, meaning, _GATED_BIASES, activation_parameters)


def _plain(name: str, meaning: str) -> SubLayer:
    return SubLayer(name, _PLAIN, meaning, _PLAIN_BIASES)


SUBLAYERS: dict[str, SubLayer] = {
    s.name: s
    for s in (
        SubLayer(
            "T5_FF",
            (
                ExpertTensor("layer_norm", ("layer_norm_weight",), ("d_model",)),
                ExpertTensor("gate_up", ("wi_0_weight", "wi_1_weight"), ("hidden_size", "d_model")),
                ExpertTensor("down", ("wo_weight",), ("d_model", "hidden_size")),
            ),
            "x + down(gelu_tanh(gate(n)) * up(n)), n = layer_norm * x / sqrt(mean(x^2) + 1e-6)",
        ),
        _gated("Gated_SiLU", "down(silu(gate(x)) * up(x)) (Mixtral, Qwen, DeepSeek, OLMoE)"),
        _gated("Gated_GELU", "down(gelu(gate(x)) * up(x))"),
        _gated("Gated_GELU_Tanh", "down(gelu_tanh(gate(x)) * up(x))"),
        _gated("Gated_ReLU", "down(relu(gate(x)) * up(x))"),
        _gated(
            "Clamped_SwiGLU",
            "down(g * sigmoid(`activation_alpha` * g) * (u + `activation_beta`)), g = min(gate(x),"
            " `swiglu_limit`), u = up(x) between minus and plus `swiglu_limit` (gpt-oss)",
            activation_parameters=True,
        ),
        _plain("SiLU_FF", "down(silu(up(x)))"),
        _plain("ReLU_FF", "down(relu(up(x))) (Switch)"),
        _plain("GELU_FF", "down(gelu(up(x)))"),
        _plain("GELU_Tanh_FF", "down(gelu_tanh(up(x)))"),
        SubLayer("Identity", (), "x"),
    )
}
