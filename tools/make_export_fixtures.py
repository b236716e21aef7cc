"""Makes tests/exports/: graphs of releases of transformers that the tests' environment has not.

    python -m venv old && old/bin/pip install torch onnxscript "transformers==4.57.*" optimum-onnx
    old/bin/python tools/make_export_fixtures.py

    python -m venv 517 && 517/bin/pip install torch==2.11.0 onnxscript "transformers==5.17.*" \
        onnxruntime "onnxruntime-genai==0.18.*"
    517/bin/python tools/make_export_fixtures.py

Those of the installed release are made. Each is the graph of a tiny model with random weights
(NAME.onnx.gz), as the exporter wrote it but for its traces of the source, inputs for it, and
PyTorch's logits for them (NAME.npz). ``missing`` ones are recorded with one token, so that their
loops hold only the experts that it chose; Switch's ``one-token`` also holds that there was one.
"""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
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

_GPT_OSS_GENAI: dict[str, Any] = {
    "vocab_size": 40,  # the builder takes whatever Linear has as many rows for the head
    "hidden_size": 16,
    "num_local_experts": 4,
    "head_dim": 16,
    "sliding_window": 16,
    "tie_word_embeddings": False,
    "swiglu_limit": 7.0,
    # A short context keeps the tables of the rotary embedding small.
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 2.0,
        "rope_theta": 150000.0,
        "beta_fast": 1.5,
        "beta_slow": 0.5,
        "truncate": False,
        "original_max_position_embeddings": 16,
    },
}
_QWEN_GENAI: dict[str, Any] = {
    "text_config": {
        **_SIZES,
        "vocab_size": 40,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "head_dim": 8,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        # ONNX Runtime 1.32's CPU has no rotary embedding with positions in three dimensions.
        "layer_types": ["linear_attention"],
        "tie_word_embeddings": False,
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "num_position_embeddings": 16,
        "out_hidden_size": 16,
        "patch_size": 4,
    },
    "tie_word_embeddings": False,
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
    precision: str = "fp32"
    """For onnxruntime-genai's builder."""

    @property
    def encoder(self) -> bool:
        """Whether the graph is an encoder's, without a head."""
        return not self.causal and self.exporter != "genai"


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
    Fixture("gpt-oss-genai", "GptOss", "genai", _GPT_OSS_GENAI, release="5.17"),
    Fixture("qwen3.5-moe-genai", "Qwen3_5Moe", "genai", _QWEN_GENAI, causal=False, release="5.17"),
    Fixture(
        "qwen3.5-moe-genai-int4",
        "Qwen3_5Moe",
        "genai",
        _QWEN_GENAI,
        causal=False,
        release="5.17",
        precision="int4",
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
    wrapped = (_Encoder if fixture.encoder else _Causal)(model).eval()
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


def _genai(fixture: Fixture, model: Any, ids: torch.Tensor, path: Path) -> None:
    """What a user of onnxruntime-genai does with a local folder."""
    from tokenizers import Tokenizer, models

    source, built = path.parent / "source", path.parent / "built"
    model.save_pretrained(source)
    words = {f"w{n}": n for n in range(model.config.get_text_config().vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", bos_token="w1", eos_token="w2", pad_token="w0"
    )
    fast.save_pretrained(source)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", fixture.name]
    command += ["-i", str(source), "-o", str(built), "-c", str(path.parent / "cache")]
    command += ["-p", fixture.precision, "-e", "cpu"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}")
    onnx.save(onnx.load(built / "model.onnx"), path)


def _without_past(
    fixture: Fixture, model: onnx.ModelProto, batch: int, seq: int
) -> dict[str, np.ndarray]:
    """The other inputs of a decoder graph, for a prompt."""
    # A cache of a sliding window is one buffer, of the window's size.
    window = int(fixture.sizes.get("sliding_window", 0))
    sizes = {"batch_size": batch, "sequence_length": seq}
    sizes |= {"kv_cache_dim": int(fixture.sizes.get("head_dim", 0))}
    sizes |= {"past_sequence_length": window, "past_sliding_length": window}
    feeds: dict[str, np.ndarray] = {}
    for value in model.graph.input:
        shape = [d.dim_value or sizes.get(d.dim_param, 0) for d in value.type.tensor_type.shape.dim]
        if value.name == "attention_mask":
            feeds[value.name] = np.ones((batch, seq), np.int64)
        elif value.name == "position_ids":
            feeds[value.name] = np.broadcast_to(np.arange(seq), shape)
        elif value.name != "input_ids":
            feeds[value.name] = np.zeros(shape, np.float32)
    return feeds


EXPORTERS: dict[str, Callable[[Fixture, Any, torch.Tensor, Path], None]] = {
    "torchscript": _torchscript,
    "dynamo": _dynamo,
    "optimum": _optimum,
    "transformers": _transformers,
    "genai": _genai,
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
    wrapped = (_Encoder if fixture.encoder else _Plain)(model).eval()
    with torch.no_grad():
        logits = wrapped(ids).numpy()
    feeds = {"input_ids": ids.numpy()}
    if fixture.exporter == "genai":
        feeds |= _without_past(fixture, onnx.load_from_string(graph), *ids.shape)
    np.savez_compressed(FOLDER / f"{fixture.name}.npz", **feeds, logits=logits)
    return len(packed)


def main() -> None:
    """Makes those of the installed release."""
    FOLDER.mkdir(exist_ok=True)
    release = ".".join(transformers.__version__.split(".")[:2])
    fixtures = [fixture for fixture in FIXTURES if fixture.release == release]
    if not fixtures:
        known = ", ".join(sorted({fixture.release for fixture in FIXTURES}))
        raise SystemExit(f"transformers {release} is installed; fixtures are made with {known}")
    chosen = sys.argv[1:]
    for fixture in fixtures:
        if chosen and fixture.name not in chosen:
            continue
        size = make(fixture)
        print(f"{fixture.name}: {size} bytes")
        assert size <= MOST_BYTES, f"{fixture.name} has {size} bytes, more than {MOST_BYTES}"


if __name__ == "__main__":
    main()
