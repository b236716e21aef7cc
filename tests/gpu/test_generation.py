"""Ranges, plans, comparisons and text generation through ONNX Runtime's TensorRT provider."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")

from tensorrt_needed import ENGINE, TRT  # noqa: E402

import moe_infer  # noqa: E402
from moe_infer.runtime.plan import plan  # noqa: E402

REST = ["CUDAExecutionProvider", "CPUExecutionProvider"]
ORIGINAL = Path(__file__).resolve().parents[2] / "examples/tiny_moe/gated_top2.onnx"


pytestmark = ENGINE


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewritten")
    moe_infer.rewrite(ORIGINAL, folder)
    return folder / "model.onnx"


def _cached(folder: Path) -> list[Any]:
    """TensorRT with its engines written to a folder, where they can be counted."""
    options = {"trt_engine_cache_enable": True, "trt_engine_cache_path": str(folder)}
    return [(TRT, options), *REST]


def _engines(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.engine")}


def test_one_engine_serves_every_length_in_the_ranges(rewritten: Path, tmp_path: Path) -> None:
    made = moe_infer.InferenceSession(
        rewritten, providers=_cached(tmp_path), dims={"seq": (1, 16, 256)}
    )
    assert made.moe_provider == TRT
    plain = ort.InferenceSession(ORIGINAL, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    first: dict[str, int] = {}
    for length in (7, 1, 256, 33, 2):
        feeds = {"tokens": rng.integers(0, 512, (1, length))}
        (found,) = made.run(None, feeds)
        (expected,) = plain.run(None, feeds)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
        first = first or _engines(tmp_path)
        assert first
        assert _engines(tmp_path) == first
    with pytest.raises(ValueError, match="was made for"):
        made.run(None, {"tokens": np.zeros((1, 257), np.int64)})


@pytest.mark.needs_onnxruntime_1_32
def test_the_plan_of_a_model_on_tensorrt(rewritten: Path) -> None:
    told = plan(rewritten, [TRT, *REST], dims={"seq": (1, 16, 256)})
    assert not told.lowered
    assert told.layers == {f"MoELayer.{i}": [TRT] for i in range(4)}
    assert told.parts[0].provider == TRT


def test_verify_on_tensorrt(rewritten: Path) -> None:
    report = moe_infer.verify(ORIGINAL, rewritten, providers=[TRT, *REST], atol=1e-3, rtol=1e-3)
    assert report, str(report)
    assert report.providers[1] == TRT
    assert len([layer for layer in report.layers if layer.difference is not None]) == 4


def test_text_generation_builds_one_engine_and_says_what_pytorch_says(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from examples.decoding.cache import Decoder
    from examples.decoding.sampling import Sampling
    from examples.generate import generate
    from examples.tiny_moe import to_mixtral
    from moe_infer.torch import export_pretrained

    to_mixtral.write(tmp_path / "in")
    export_pretrained(tmp_path / "in", tmp_path / "out")
    engines = tmp_path / "engines"
    engines.mkdir()
    decoder = Decoder(tmp_path / "out/model.onnx", _cached(engines), context=128)
    assert decoder.session.moe_provider == TRT
    assert decoder.device == "cuda"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "in", local_files_only=True, attn_implementation="eager"
    ).eval()
    prompt = [3, 17, 5, 99, 200, 41]
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=40,
        do_sample=False,
    )
    tokens = []
    built: dict[str, int] = {}
    for token in generate(decoder, prompt, 40, Sampling()):
        tokens.append(token)
        built = built or _engines(engines)
        assert _engines(engines) == built
    assert built
    assert tokens == output[0, len(prompt) :].tolist()
