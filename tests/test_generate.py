"""Text generation on rewritten decoder graphs: the tokens that PyTorch generates."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from examples.decoding.sampling import Sampler, Sampling

ROOT = Path(__file__).resolve().parent.parent
CPU = ["CPUExecutionProvider"]
LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2]))


# --- Sampling


def test_greedy_takes_the_likeliest_and_the_first_of_equals() -> None:
    assert Sampler(Sampling()).choose(LOGITS) == 1
    assert Sampler(Sampling()).choose(np.zeros(4)) == 0


def _shares(sampling: Sampling, count: int = 20000) -> np.ndarray:
    sampler = Sampler(sampling)
    chosen = [sampler.choose(LOGITS) for _ in range(count)]
    return np.bincount(chosen, minlength=5) / count


def test_temperature_one_samples_the_probabilities() -> None:
    np.testing.assert_allclose(_shares(Sampling(1.0)), np.exp(LOGITS), atol=0.015)


def test_temperature_sharpens() -> None:
    expected = np.exp(LOGITS / 0.5)
    np.testing.assert_allclose(_shares(Sampling(0.5)), expected / expected.sum(), atol=0.015)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1.0, top_k=2), [1, 3]),
        (Sampling(1.0, top_p=0.6), [1, 3]),  # 0.4 is not enough, 0.65 is
        (Sampling(1.0, top_p=0.39), [1]),
        (Sampling(1.0, top_k=4, top_p=0.89), [1, 3, 4]),  # of four: 0.42 + 0.26 + 0.21 is enough
    ],
)
def test_what_is_kept(sampling: Sampling, kept: list[int]) -> None:
    shares = _shares(sampling)
    assert sorted(np.flatnonzero(shares)) == sorted(kept)
    expected = np.exp(LOGITS[kept])
    np.testing.assert_allclose(shares[kept], expected / expected.sum(), atol=0.015)


def test_a_seed_repeats() -> None:
    def run(seed: int) -> list[int]:
        sampler = Sampler(Sampling(1.0, seed=seed))
        return [sampler.choose(LOGITS) for _ in range(50)]

    assert run(3) == run(3) != run(4)


def test_sampling_errors() -> None:
    for wrong in (
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -1},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            Sampling(**wrong)
    with pytest.raises(ValueError, match="the logits hold NaN"):
        Sampler(Sampling()).choose(np.array([0.0, np.nan]))


# --- Graphs


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model in Mixtral's form."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from examples.tiny_moe import to_mixtral

    folder = tmp_path_factory.mktemp("mixtral")
    to_mixtral.write(folder)
    return folder


@pytest.fixture(scope="module")
def exported(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from moe_infer.torch import export_pretrained

    folder = tmp_path_factory.mktemp("exported")
    report = export_pretrained(mixtral, folder)
    assert len(report.layers.layers) == 4
    return folder


def _pytorch(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, attn_implementation="eager"
    ).eval()


def _greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    import torch

    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=count,
        do_sample=False,
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.needs_torch
def test_the_trained_model_is_a_mixtral(mixtral: Path) -> None:
    import torch

    from examples.tiny_moe.export import load_model

    tokens = torch.randint(0, 512, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = load_model("gated_top2")(tokens)
        theirs = _pytorch(mixtral)(tokens).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    assert ours.abs().max() > 10


@pytest.mark.needs_torch
def test_its_tokenizer_too(mixtral: Path) -> None:
    from examples.generate import load_tokenizer
    from examples.tiny_moe.tokenizer import Tokenizer

    encode, decode = load_tokenizer(mixtral)
    table = Tokenizer.load()
    for text in (
        "In the beginning God created the heaven and the earth.",
        "Genesis 12\nNow the LORD had said unto Abram;  (7 days) and, behold: \n\nwherefore?",
    ):
        assert encode(text) == table.encode(text)
        assert decode(encode(text)) == text


@pytest.mark.needs_torch
def test_the_same_tokens_as_pytorch(mixtral: Path, exported: Path) -> None:
    from examples.decoding.cache import Decoder
    from examples.generate import generate, load_tokenizer

    encode, _ = load_tokenizer(mixtral)
    model = _pytorch(mixtral)
    decoder = Decoder(exported / "model.onnx", CPU, context=128)
    assert decoder.session.lowered
    for text in ("In the beginning", "Genesis 1\nAnd the LORD"):
        prompt = encode(text)
        made = list(generate(decoder, prompt, 60, Sampling()))
        assert len(made) == 60
        assert made == _greedy(model, prompt, 60)


@pytest.mark.needs_torch
def test_a_prompt_in_pieces(exported: Path) -> None:
    from examples.decoding.cache import Decoder

    prompt = list(range(40, 61))
    whole = Decoder(exported / "model.onnx", CPU, context=32).run(prompt)
    decoder = Decoder(exported / "model.onnx", CPU, context=32, chunk=8)
    np.testing.assert_allclose(decoder.run(prompt), whole, rtol=0, atol=1e-4)
    assert decoder.length == 21
    with pytest.raises(ValueError, match=r"12 tokens after 21; .* at most 32"):
        decoder.run(prompt[:12])


@pytest.mark.needs_torch
def test_the_ranges_agree(exported: Path) -> None:
    """Past and new tokens add up to the mask's length in each of the three shapes."""
    from examples.decoding.cache import _ranges

    ranges = _ranges(exported / "model.onnx", 100, 8)
    assert ranges == {
        "batch_size": (1, 1, 1),
        "sequence_length": (1, 1, 8),
        "past_sequence_length": (0, 50, 100),
        "total_sequence_length": (1, 51, 108),
    }


@pytest.mark.needs_torch
def test_the_end(exported: Path) -> None:
    from examples.decoding.cache import Decoder
    from examples.generate import generate

    decoder = Decoder(exported / "model.onnx", CPU, context=16)
    whole = list(generate(decoder, [1, 2, 3], 50, Sampling()))
    assert len(whole) == 14  # the context holds 16, and the last token is not read any more
    stop = whole[5]
    ended = list(generate(decoder, [1, 2, 3], 50, Sampling(), stop=[stop]))
    assert ended == whole[: whole.index(stop) + 1]
    with pytest.raises(ValueError, match="17 tokens after 0"):
        next(generate(decoder, [1] * 17, 1, Sampling()))
    with pytest.raises(ValueError, match="0 tokens after 0"):
        next(generate(decoder, [], 1, Sampling()))


@pytest.mark.needs_torch
def test_command(exported: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "examples/generate.py", str(exported), "--provider", "cpu"]
        return subprocess.run(
            [*command, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    sampled = ["--tokens", "12", "--temperature", "0.9", "--top-k", "40", "--top-p", "0.95"]
    once, again = (run("--prompt", "And God said", *sampled, "--seed", "5") for _ in range(2))
    assert once.returncode == 0, once.stderr
    assert once.stdout.startswith("And God said")
    assert len(once.stdout) > 20
    assert once.stdout == again.stdout
    assert "tokens a second, 12 tokens" in once.stderr
    ids = run("--ids", "3,17,5", "--tokens", "4")
    assert [0 <= int(i) < 512 for i in ids.stdout.split(",")] == [True] * 4
    wrong = run("--ids", "3", "--top-p", "2")
    assert wrong.returncode == 1
    assert "generate: error: top_p must be" in wrong.stderr


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line of a command that must fail."""
    from examples.generate import main

    assert main([str(a) for a in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    said = [x for x in captured.err.splitlines() if not x.startswith("MoELayer nodes are lowered")]
    assert len(said) == 1 and said[0].startswith("generate: error: ")
    return said[0]


def test_the_commands_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers")
    expected = "model.onnx does not exist; expected what `moe-infer export` writes"
    assert expected in _refused(capsys, tmp_path / "none", "--ids", "3")
    (tmp_path / "model.onnx").touch()
    assert expected in _refused(capsys, tmp_path / "model.onnx", "--ids", "3")
    for ids in ("x", "", "3,"):
        assert f"such as 3,17,5, got '{ids}'" in _refused(capsys, tmp_path, "--ids", ids)
    for count in ("0", "-1"):
        said = _refused(capsys, tmp_path, "--ids", "3", "--tokens", count)
        assert f"--tokens must be at least 1, got {count}" in said
    assert "copy it from the model's folder" in _refused(capsys, tmp_path, "--prompt", "a")
    (tmp_path / "tokenizer.json").write_text("{")
    said = _refused(capsys, tmp_path, "--prompt", "a")
    assert f"{tmp_path / 'tokenizer.json'} is no tokenizer that can be read" in said
    (tmp_path / "config.json").write_text("{")
    assert f"{tmp_path / 'config.json'} cannot be read" in _refused(capsys, tmp_path, "--ids", "3")


@pytest.mark.needs_torch
def test_tokens_and_providers_that_are_not_there(
    exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for ids in ("99999", "3,-1"):
        said = _refused(capsys, exported, f"--ids={ids}", "--provider", "cpu")
        assert f"token {ids.split(',')[-1]} is none of the model's, which are 0 to 511" in said
    if "TensorrtExecutionProvider" not in ort.get_available_providers():
        said = _refused(capsys, exported, "--ids", "3", "--provider", "tensorrt")
        assert "pip install 'moe-infer[gpu]'" in said


@pytest.mark.needs_torch
def test_the_layout_of_transformers_exporter(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    import model_zoo
    import moe_infer
    from examples.decoding.cache import Decoder
    from examples.generate import generate

    made = model_zoo.make("Mixtral")
    model = copy.deepcopy(made.model)
    model.set_experts_implementation(made.experts)
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
    inputs = {
        "input_ids": ids[:, 4:],
        "attention_mask": torch.ones(2, 7, dtype=torch.int64),
        "position_ids": torch.arange(4, 7).repeat(2, 1),
        "past_key_values": cache,
        "use_cache": True,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True))
        (tmp_path / "in").mkdir()
        model_zoo.save(exported, tmp_path / "in/model.onnx")
    report = moe_infer.rewrite(tmp_path / "in/model.onnx", tmp_path / "out")
    assert len(report.layers) == 2, str(report)
    decoder = Decoder(tmp_path / "out/model.onnx", CPU, context=64)
    assert "past_key_values.layers.0" in next(iter(decoder.pairs))
    for row in ids.tolist():
        made_here = list(generate(decoder, row, 20, Sampling(), stop=[model.config.eos_token_id]))
        assert len(made_here) > 5
        assert made_here == _greedy(model, row, 20)


def test_a_graph_without_a_cache() -> None:
    from examples.decoding.cache import Decoder

    with pytest.raises(ValueError, match="must take input_ids and give logits; it takes tokens"):
        Decoder(ROOT / "examples/tiny_moe/gated_top2.onnx", CPU)
