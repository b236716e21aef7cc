"""What the rewriter does with exports of real models: one row for each, tested and documented.

To add a row, add an entry to :data:`ROWS`, run ``pytest tests/test_models.py`` and then
``python tools/make_models.py``, which brings what the tests found into the documentation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared_files import alone

ROOT = Path(__file__).resolve().parent.parent
FOUND = ROOT / "build/models.json"
"""What the tests of this checkout found last."""
PAGE = ROOT / "docs/models.json"
"""What the documentation says."""


@dataclass(frozen=True)
class Row:
    """A model, how it was exported, and what must come of it."""

    family: str
    """Of the zoo; for a graph in tests/exports the model's name."""
    exporter: str
    """Of the zoo; for a graph in tests/exports how it was made."""
    blocks: int = 0
    """MoE blocks that become MoELayer nodes; 0: the graph is refused."""
    layer: dict[str, Any] = field(default_factory=dict)
    """Attributes that every one of them has."""
    refusal: str = ""
    """Part of the reason."""
    near_misses: bool = False
    """True: parts of the graph look like MoE blocks and are none; they are left as they are."""
    fixture: str = ""
    """Name of a graph in tests/exports."""
    transformers: str = ""
    """Version that made it."""

    @property
    def key(self) -> tuple[str, str, str]:
        """By which a row is found again; the version of the zoo's rows is what is installed."""
        return self.family, self.exporter, self.transformers if self.fixture else ""


@dataclass(frozen=True)
class Outcome:
    """What came of a row."""

    family: str
    exporter: str
    transformers: str
    fixture: bool
    blocks: int
    difference: float | None
    """Largest difference of the logits from PyTorch's; None: refused."""
    refusal: str

    @property
    def key(self) -> tuple[str, str, str]:
        """See :attr:`Row.key`."""
        return self.family, self.exporter, self.transformers if self.fixture else ""


_LAYERS: dict[str, dict[str, Any]] = {
    "Mixtral": {
        "moe_variant": "softmax_topk",
        "normalize_routing_weights": 1,
        "expert_sublayer_type": "Gated_SiLU",
    },
    "Qwen2-MoE": {"moe_variant": "softmax_topk", "normalize_routing_weights": 0},
    "Qwen3-MoE": {"moe_variant": "softmax_topk", "normalize_routing_weights": 1},
    "OLMoE": {"moe_variant": "softmax_topk", "normalize_routing_weights": 0},
    "gpt-oss": {
        "moe_variant": "topk_softmax",
        "expert_sublayer_type": "Clamped_SwiGLU",
        "expert_bias": 1,
        "activation_alpha": 1.702,
        "activation_beta": 1.0,
        "swiglu_limit": 7.0,
    },
    "DeepSeek-V3": {
        "moe_variant": "sigmoid_topk",
        "normalize_routing_weights": 1,
        "top_k": 3,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
    },
    "Granite-MoE": {"expert_sublayer_type": "Gated_SiLU", "top_k": 2},
    "Phi-MoE": {"moe_variant": "sparse_mixer", "top_k": 2, "router_jitter": 0.1},
}
"""Attributes that a family's layers have, whatever exported it."""

GENAI = "onnxruntime-genai 0.18"
"""Its builder, on a model that the named transformers made; 32-bit, for the CPU."""

ONE_TOKEN = "torchscript, one token"
"""The sample input has one token, which chooses only some of the experts."""

_EXPORTERS = ("dynamo", "torchscript", "transformers", "transformers-cuda")


def _zoo() -> list[Row]:
    return [
        Row(family, exporter, 2, layer)
        for family, layer in _LAYERS.items()
        for exporter in _EXPORTERS
    ]


ROWS: tuple[Row, ...] = (
    *_zoo(),
    # The intermediate size is the hidden size: no shape tells the experts' axes apart.
    Row("Mixtral-square", "torchscript", 2, _LAYERS["Mixtral"]),
    # Its attention is a mixture of experts, too, of another kind, and is left as it is.
    *(
        Row("JetMoE", exporter, 2, {"moe_variant": "topk_softmax"}, near_misses=True)
        for exporter in ("dynamo", "transformers", "transformers-cuda")
    ),
    Row("JetMoE", "torchscript", refusal="right for its sample input only"),
    *(
        Row(family, exporter, 1, layer, fixture=fixture, transformers="4.57")
        for family, exporter, fixture, layer in (
            ("Mixtral", "torchscript", "mixtral-torchscript", _LAYERS["Mixtral"]),
            ("OLMoE", "dynamo", "olmoe-dynamo", _LAYERS["OLMoE"]),
            ("OLMoE", "torchscript", "olmoe-torchscript", _LAYERS["OLMoE"]),
            ("Qwen3-MoE", "optimum-onnx", "qwen3-moe-optimum", _LAYERS["Qwen3-MoE"]),
            ("gpt-oss", "optimum-onnx", "gpt-oss-optimum", _LAYERS["gpt-oss"]),
            ("Switch", "torchscript", "switch-torchscript", {"top_k": 1}),
        )
    ),
    *(
        Row(family, exporter, 1, layer, fixture=f"{fixture}-5.17", transformers="5.17")
        for family, exporter, fixture, layer in (
            ("Mixtral", "transformers", "mixtral-transformers", _LAYERS["Mixtral"]),
            ("gpt-oss", "transformers", "gpt-oss-transformers", _LAYERS["gpt-oss"]),
            ("Switch", "torchscript", "switch-torchscript", {"top_k": 1}),
        )
    ),
    Row(
        "gpt-oss",
        GENAI,
        1,
        # A softmax of the chosen is that of all, divided by the sum of the chosen.
        {
            **_LAYERS["gpt-oss"],
            "moe_variant": "softmax_topk",
            "normalize_routing_weights": 1,
        },
        fixture="gpt-oss-genai",
        transformers="5.17",
    ),
    Row(
        "Qwen3.5-MoE",
        GENAI,
        1,
        {"expert_sublayer_type": "Gated_SiLU", "normalize_routing_weights": 1},
        fixture="qwen3.5-moe-genai",
        transformers="5.17",
    ),
    Row(
        "Qwen3.5-MoE",
        f"{GENAI}, int4",
        refusal="the experts are quantised (QMoE, 4 bits",
        fixture="qwen3.5-moe-genai-int4",
        transformers="5.17",
    ),
    *(
        Row(family, exporter, refusal=refusal, fixture=fixture, transformers="4.57")
        for family, exporter, fixture, refusal in (
            ("Mixtral", ONE_TOKEN, "mixtral-torchscript-missing", "holds 2 of 4 experts"),
            ("DeepSeek-V3", "torchscript", "deepseek-v3-torchscript", "must be minus infinity"),
            ("DeepSeek-V3", ONE_TOKEN, "deepseek-v3-torchscript-missing", "holds 2 of 4 experts"),
            ("Switch", ONE_TOKEN, "switch-torchscript-one-token", "Export again with a sample"),
            ("NLLB-MoE", "torchscript", "nllb-moe-torchscript", "an Einsum reads a boolean mask"),
        )
    ),
)


def load(path: Path) -> dict[tuple[str, str, str], Outcome]:
    """Outcomes in a file, by their keys; none if there is no file."""
    if not path.exists():
        return {}
    outcomes = [Outcome(**entry) for entry in json.loads(path.read_text())]
    return {outcome.key: outcome for outcome in outcomes}


def record(outcome: Outcome) -> None:
    """Keeps an outcome for tools/make_models.py."""
    with alone(FOUND):
        save(FOUND, {**load(FOUND), outcome.key: outcome})


def save(path: Path, outcomes: dict[tuple[str, str, str], Outcome]) -> None:
    """Writes outcomes in the order of the rows."""
    entries = [vars(outcomes[row.key]) for row in ROWS if row.key in outcomes]
    path.write_text(json.dumps(entries, indent=1) + "\n")
