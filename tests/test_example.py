"""The trained example: tokenizer, records, exported graphs, PyTorch against them, and the demo."""

from __future__ import annotations

import json
import math
import os
import re
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.tiny_moe import corpus
from examples.tiny_moe.tokenizer import Tokenizer, learn

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "examples" / "tiny_moe"
VARIANTS = ("t5_top1", "gated_top2")
TABLE = Tokenizer.load()

HELD_OUT = """Revelation 22
And he shewed me a pure river of water of life, clear as crystal, proceeding out of the throne of \
God and of the Lamb.
In the midst of the street of it, and on either side of the river, was there the tree of life, \
which bare twelve manner of fruits, and yielded her fruit every month: and the leaves of the tree \
were for the healing of the nations.
And there shall be no more curse: but the throne of God and of the Lamb shall be in it; and his \
servants shall serve him:
And they shall see his face; and his name shall be in their foreheads.
"""
"""From the validation part of the text, which the models were not trained on."""


def read_record(variant: str) -> dict:
    return json.loads((HERE / f"{variant}.json").read_text(encoding="utf-8"))


def token_ids(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, len(TABLE), (1, count))


# Tokenizer


@given(st.text(alphabet=TABLE.characters, max_size=200))
def test_tokenizer_round_trip(text):
    assert TABLE.decode(TABLE.encode(text)) == text


def test_tokenizer_joins_frequent_words():
    ids = TABLE.encode(" And the LORD said unto Moses")
    assert [TABLE.tokens[i] for i in ids][:4] == [" And", " the", " LORD", " said"]


def test_tokenizer_names_an_unknown_character():
    with pytest.raises(ValueError, match=r"character 'é' at position 3"):
        TABLE.encode("café")


def test_learning_joins_the_most_frequent_pair_first():
    table = learn("aaab aaab\n", vocabulary=6)
    assert table.characters == "\n ab"
    # "aa" twice a word; then "aa"+"a" and "a"+"b" are level, and the smaller ids go first.
    assert table.tokens[4:] == ["aa", "ab"]
    assert table.decode(table.encode("aaab aaab\n")) == "aaab aaab\n"


# Corpus


def test_corpus_becomes_chapters():
    listing = "Ge1:1 In the  beginning.\nGe1:2 And the earth.\nGe2:1 Thus.\nExo1:1 Now these."
    assert corpus.format_chapters(listing) == (
        "Genesis 1\nIn the beginning.\nAnd the earth.\n\nGenesis 2\nThus.\n\nExodus 1\nNow these.\n"
    )


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        ("Ge1:1 In.\nno verse", "line 2 of the listing is no verse"),
        ("Abc1:1 In.", "line 1 of the listing is no verse"),
        ("Exo1:1 Now.\nGe1:1 In.", "line 2 of the listing is out of order"),
    ],
)
def test_corpus_refuses(listing, message):
    with pytest.raises(ValueError, match=message):
        corpus.format_chapters(listing)


def test_split_keeps_chapters_whole():
    text = "".join(f"Book {i}\n{string.ascii_lowercase}\n\n" for i in range(100))
    train, validation = corpus.split(text)
    assert train + validation == text
    assert validation.startswith("Book ")
    assert 0.03 < len(validation) / len(text) <= 0.05


# Records and weights


@pytest.mark.parametrize("variant", VARIANTS)
def test_record_tells_a_real_training(variant):
    record = read_record(variant)
    assert record["model"]["variant"] == variant
    assert record["model"]["vocabulary"] == len(TABLE)
    assert record["validation_loss"] < 0.6 * record["unigram_validation_loss"]
    curve = record["curve"]
    assert len(curve) > 10
    assert curve[0]["validation_loss"] > record["validation_loss"] + 0.3
    assert min(c["validation_loss"] for c in curve) == pytest.approx(
        record["validation_loss"], abs=2e-3
    )
    assert record["data"]["sha256"] == corpus.SHA256
    assert record["training"]["seed"] >= 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", record["date"])
    assert record["machine"] and record["versions"]["torch"]


def test_weights_are_small_and_finite():
    from safetensors.numpy import load_file

    assert sum((HERE / f"{v}.safetensors").stat().st_size for v in VARIANTS) <= 10_000_000
    for variant in VARIANTS:
        tensors = load_file(HERE / f"{variant}.safetensors")
        assert sum(t.size for t in tensors.values()) == read_record(variant)["parameters"]
        assert {t.dtype for t in tensors.values()} == {np.dtype(np.float16)}
        assert all(np.isfinite(t).all() for t in tensors.values())


# Exported graphs


@pytest.mark.parametrize("variant", VARIANTS)
def test_graph_points_into_the_weights(variant):
    path = HERE / f"{variant}.onnx"
    assert path.stat().st_size < 1_000_000
    onnx.checker.check_model(str(path))
    model = onnx.load(path, load_external_data=False)
    external = [t for t in model.graph.initializer if t.external_data]
    assert sum(math.prod(t.dims) for t in external) > 0.99 * read_record(variant)["parameters"]
    size = (HERE / f"{variant}.safetensors").stat().st_size
    for tensor in external:
        entry = {e.key: e.value for e in tensor.external_data}
        assert entry["location"] == f"{variant}.safetensors"
        assert int(entry["offset"]) + int(entry["length"]) <= size
        assert int(entry["length"]) == 2 * math.prod(tensor.dims)


@pytest.mark.parametrize("variant", VARIANTS)
def test_graph_predicts_text_it_has_not_seen(variant):
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(HERE / f"{variant}.onnx", providers=["CPUExecutionProvider"])
    ids = np.array([TABLE.encode(HELD_OUT)])
    logits = session.run(None, {"tokens": ids})[0][0, :-1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss = -log_probability[np.arange(ids.shape[1] - 1), ids[0, 1:]].mean()
    assert loss < 0.6 * read_record(variant)["unigram_validation_loss"]
    # And it is a language model, not a copy of the text's frequencies: words depend on their place.
    shuffled = np.random.default_rng(0).permutation(ids[0])[None]
    assert np.abs(session.run(None, {"tokens": shuffled})[0] - logits[-1]).max() > 1


# PyTorch


@pytest.mark.needs_torch
@pytest.mark.parametrize("variant", VARIANTS)
def test_training_form_agrees_with_the_exported_form(variant):
    torch = pytest.importorskip("torch")
    from examples.tiny_moe.model import LanguageModel, ModelConfig

    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(variant, dropout=0.0))
    for name, parameter in model.named_parameters():
        if "norm" in name:  # all ones when new, which would hide a norm of the wrong expert
            parameter.data += 0.3 * torch.randn_like(parameter)
    tokens = torch.randint(model.config.vocabulary, (2, 40))
    evaluated = model.eval()(tokens)
    trained = model.train()(tokens)
    torch.testing.assert_close(trained, evaluated, atol=2e-5, rtol=1e-5)
    (trained.sum() + model.balance_loss()).backward()
    for block in model.blocks:
        assert block.moe.router.grad.abs().max() > 0


@pytest.mark.needs_torch
@pytest.mark.parametrize("variant", VARIANTS)
def test_experts_are_those_of_the_operator(variant):
    """The trained first MoE layer against the float64 reference of the operator."""
    torch = pytest.importorskip("torch")
    from examples.tiny_moe.export import load_model
    from moe_infer.op import LayerConfig
    from moe_infer.reference import moe_layer

    moe = load_model(variant, HERE).blocks[0].moe
    x = torch.randn(50, 160, generator=torch.Generator().manual_seed(3))
    top1 = variant == "t5_top1"
    config = LayerConfig.from_attributes(
        {
            "expert_count": 8,
            "hidden_size": 128,
            "expert_sublayer_type": "T5_FF" if top1 else "Gated_SiLU",
            "expert_weight_file": "unused.safetensors",
            "moe_variant": "default" if top1 else "softmax_topk",
            "top_k": 1 if top1 else 2,
            "normalize_routing_weights": 0 if top1 else 1,
        }
    )
    a, b, c = (moe.wi_0, moe.wi_1, moe.wo) if top1 else (moe.gate, moe.up, moe.down)

    def packed(e):
        gate_up = torch.stack([a[e], b[e]], 1).flatten(0, 1)  # rows of gate and up alternate
        tensors = {"gate_up": gate_up, "down": c[e]}
        if top1:
            tensors["layer_norm"] = moe.norm[e]
        return {name: tensor.detach().numpy() for name, tensor in tensors.items()}

    experts = {e: packed(e) for e in range(8)}
    scores = (x @ moe.router.float()).detach()
    expected = moe_layer(x.numpy(), config, experts, router_logits=scores.numpy())
    np.testing.assert_allclose(moe(x).detach().numpy(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.needs_torch
@pytest.mark.parametrize("variant", VARIANTS)
def test_exporting_again_gives_the_committed_graph(variant):
    torch = pytest.importorskip("torch")
    ort = pytest.importorskip("onnxruntime")
    from examples.tiny_moe.export import export_graph, load_model, refer_to_weights

    model = load_model(variant, HERE)
    again = export_graph(model)
    session = ort.InferenceSession(HERE / f"{variant}.onnx", providers=["CPUExecutionProvider"])
    fresh = ort.InferenceSession(again.SerializeToString(), providers=["CPUExecutionProvider"])
    for count in (1, 2, 33, 256):
        tokens = token_ids(count, count)
        (committed,) = session.run(None, {"tokens": tokens})
        (exported,) = fresh.run(None, {"tokens": tokens})
        expected = model(torch.from_numpy(tokens)).detach().numpy()
        np.testing.assert_allclose(committed, expected, atol=2e-4, rtol=1e-4)
        np.testing.assert_allclose(exported, expected, atol=2e-4, rtol=1e-4)

    committed_graph = onnx.load(HERE / f"{variant}.onnx", load_external_data=False)
    # Another PyTorch may choose other nodes for the same numbers; the same one may not.
    if committed_graph.producer_version == again.producer_version:
        refer_to_weights(again, HERE / f"{variant}.safetensors")
        assert Counter(n.op_type for n in again.graph.node) == Counter(
            n.op_type for n in committed_graph.graph.node
        )
        assert again == committed_graph


# Demo


@pytest.mark.parametrize("variant", VARIANTS)
def test_demo_runs(variant, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "examples" / "demo.py"),
            variant,
            "--tokens=24",
            f"--out={tmp_path}",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    difference = re.search(r"largest difference\D+([0-9.e+-]+)", done.stdout)
    assert difference and float(difference[1]) < 1e-3
    assert re.search(r"[\d.]+ tokens a second", done.stdout)
    assert (tmp_path / variant / "model.onnx").is_file()
    # How many experts each of the four layers used.
    assert len(re.findall(r"\b[1-8] of 8\b", done.stdout)) == 4


@pytest.mark.parametrize(("difference", "code"), [(9e-4, 0), (1e-3, 1), (math.nan, 1)])
def test_demo_fails_on_a_difference(monkeypatch, difference, code):
    from examples import demo

    monkeypatch.setattr(demo, "demonstrate", lambda *_: difference)
    monkeypatch.setattr(sys, "argv", ["demo.py", "t5_top1"])
    assert demo.main() == code
