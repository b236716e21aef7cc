"""Makes tests/exports/: graphs of releases of transformers that the tests' environment has not.

    python -m venv old && old/bin/pip install torch onnxscript "transformers==4.57.*" optimum-onnx
    old/bin/python tools/make_export_fixtures.py

    python -m venv 517 && 517/bin/pip install torch==2.11.0 onnxscript "transformers==5.17.*"
    517/bin/python tools/make_export_fixtures.py

Those of the installed release are made. Each is the graph of a tiny model with random weights
(NAME.onnx.gz), as the exporter wrote it but for its traces of the source, and PyTorch's outputs for
some inputs (NAME.npz). ``missing`` ones are recorded with one token, so that their loops hold only
the experts that it chose; Switch's ``one-token`` also holds that there was one.
"""

from __future__ import annotations

import gzip
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests/exports"
MOST_BYTES = 40_000
VOCAB = 32

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
_DEEPSEEK: dict[str, Any] = {
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "routed_scaling_factor": 2.5,
}
_SWITCH: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 8,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 0,
    "num_heads": 2,
    "num_experts": 4,
    "expert_capacity": 4,
    "relative_attention_num_buckets": 4,
    "decoder_start_token_id": 0,
}
_NLLB: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_experts": 4,
    "encoder_sparse_step": 1,
    "decoder_sparse_step": 1,
    "max_position_embeddings": 32,
}


@dataclass(frozen=True)
class Fixture:
    """One graph."""

    name: str
    model: str
    """Name of the model class without its ending."""
    exporter: str
    sizes: dict[str, Any] = field(default_factory=dict)
    tokens: tuple[int, int] = (2, 9)
    """Batch and sequence of the sample input."""
    causal: bool = True
    release: str = "4.57"
    """Of transformers."""


FIXTURES = (
    Fixture("olmoe-dynamo", "Olmoe", "dynamo", {"num_experts": 4, "norm_topk_prob": False}),
    Fixture("olmoe-torchscript", "Olmoe", "torchscript", {"num_experts": 4}),
    Fixture(
        "qwen3-moe-optimum",
        "Qwen3Moe",
        "optimum",
        {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8, "norm_topk_prob": True},
    ),
    Fixture(
        "gpt-oss-optimum",
        "GptOss",
        "optimum",
        {"num_local_experts": 4, "head_dim": 8, "sliding_window": 16},
    ),
    Fixture("mixtral-torchscript", "Mixtral", "torchscript", {"num_local_experts": 4}),
    Fixture(
        "mixtral-torchscript-missing", "Mixtral", "torchscript", {"num_local_experts": 4}, (1, 1)
    ),
    Fixture("deepseek-v3-torchscript", "DeepseekV3", "torchscript", _DEEPSEEK),
    Fixture("deepseek-v3-torchscript-missing", "DeepseekV3", "torchscript", _DEEPSEEK, (1, 1)),
    Fixture("switch-torchscript", "SwitchTransformers", "torchscript", _SWITCH, (4, 24), False),
    Fixture(
        "switch-torchscript-one-token", "SwitchTransformers", "torchscript", _SWITCH, (1, 1), False
    ),
    Fixture("nllb-moe-torchscript", "NllbMoe", "torchscript", _NLLB, causal=False),
    Fixture(
        "mixtral-transformers-5.17",
        "Mixtral",
        "transformers",
        {"num_local_experts": 4},
        release="5.17",
    ),
    Fixture(
        "gpt-oss-transformers-5.17",
        "GptOss",
        "transformers",
        {"num_local_experts": 4, "head_dim": 8, "sliding_window": 16},
        release="5.17",
    ),
    Fixture(
        "switch-torchscript-5.17",
        "SwitchTransformers",
        "torchscript",
        _SWITCH,
        (4, 24),
        False,
        release="5.17",
    ),
)


class _Causal(torch.nn.Module):
    """Logits of a decoder; the mask is made here, where tracing can follow it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        batch, seq = input_ids.shape
        future = torch.full((seq, seq), -1e4).triu(1)[None, None].expand(batch, 1, seq, seq)
        return self.model(input_ids=input_ids, attention_mask=future, use_cache=False).logits


class _Plain(torch.nn.Module):
    """Logits of a decoder, its own mask."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


class _Encoder(torch.nn.Module):
    """Last hidden states of an encoder."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.get_encoder()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids)[0]


def _model(fixture: Fixture) -> Any:
    sizes = {**_SIZES, **fixture.sizes} if fixture.causal else fixture.sizes
    config = getattr(transformers, f"{fixture.model}Config")(**sizes)
    ending = "ForCausalLM" if fixture.causal else "ForConditionalGeneration"
    config._attn_implementation = "eager"
    torch.manual_seed(11)
    model = getattr(transformers, fixture.model + ending)(config).eval()
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if not value.is_floating_point() or "inv_freq" in name:
                continue
            if value.dim() >= 2:
                value.normal_(0, 1.2 / min(value.shape[-2:]) ** 0.5)
            else:
                value.normal_(1 if name.endswith("norm.weight") else 0, 0.2)
    return model


def _torchscript(fixture: Fixture, model: Any, ids: torch.Tensor, path: Path) -> None:
    wrapped = (_Causal if fixture.causal else _Encoder)(model).eval()
    torch.onnx.export(
        wrapped,
        (ids,),
        os.fspath(path),
        dynamo=False,
        input_names=["input_ids"],
        output_names=["logits"],
        dynamic_axes={"input_ids": {0: "batch", 1: "seq"}},
        opset_version=17,
    )


def _dynamo(fixture: Fixture, model: Any, ids: torch.Tensor, path: Path) -> None:
    program = torch.onnx.export(
        _Plain(model).eval(),
        (ids,),
        dynamo=True,
        input_names=["input_ids"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")},),
        verbose=False,
    )
    assert program is not None
    program.save(os.fspath(path), external_data=False)


def _optimum(fixture: Fixture, model: Any, ids: torch.Tensor, path: Path) -> None:
    from optimum.exporters.onnx import export
    from optimum.exporters.tasks import TasksManager

    made = TasksManager.get_exporter_config_constructor(
        "onnx", model, task="text-generation", library_name="transformers"
    )
    export(model=model, config=made(model.config), output=path, opset=17)


def _transformers(fixture: Fixture, model: Any, ids: torch.Tensor, path: Path) -> None:
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    inputs = {"input_ids": ids, "use_cache": False}
    program = OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True))
    program.save(os.fspath(path), external_data=False)


EXPORTERS: dict[str, Callable[[Fixture, Any, torch.Tensor, Path], None]] = {
    "torchscript": _torchscript,
    "dynamo": _dynamo,
    "optimum": _optimum,
    "transformers": _transformers,
}


def _without_traces(path: Path) -> onnx.ModelProto:
    model = onnx.load(path)
    del model.metadata_props[:]
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    return model


def make(fixture: Fixture) -> int:
    """Writes one fixture and returns the bytes of its graph."""
    model = _model(fixture)
    torch.manual_seed(7)
    sample = torch.randint(3, VOCAB, fixture.tokens)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        EXPORTERS[fixture.exporter](fixture, model, sample, Path(folder) / "model.onnx")
        graph = _without_traces(Path(folder) / "model.onnx").SerializeToString(deterministic=True)
    packed = gzip.compress(graph, mtime=0)
    (FOLDER / f"{fixture.name}.onnx.gz").write_bytes(packed)
    ids = torch.randint(3, VOCAB, (3, 12))
    wrapped = (_Plain if fixture.causal else _Encoder)(model).eval()
    with torch.no_grad():
        logits = wrapped(ids).numpy()
    np.savez(FOLDER / f"{fixture.name}.npz", input_ids=ids.numpy(), logits=logits)
    return len(packed)


def main() -> None:
    """Makes those of the installed release."""
    FOLDER.mkdir(exist_ok=True)
    release = ".".join(transformers.__version__.split(".")[:2])
    fixtures = [fixture for fixture in FIXTURES if fixture.release == release]
    if not fixtures:
        known = ", ".join(sorted({fixture.release for fixture in FIXTURES}))
        raise SystemExit(f"transformers {release} is installed; fixtures are made with {known}")
    for fixture in fixtures:
        size = make(fixture)
        print(f"{fixture.name}: {size} bytes")
        assert size <= MOST_BYTES, f"{fixture.name} has {size} bytes, more than {MOST_BYTES}"


if __name__ == "__main__":
    main()
