"""replace_moe: the same numbers in PyTorch and in the exported graph, and never two copies."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import nn  # noqa: E402

import model_zoo  # noqa: E402
import moe_infer  # noqa: E402
import moe_infer.torch as moe_torch  # noqa: E402
from layer_models import assert_close  # noqa: E402
from moe_infer.graph.replace import digest_name  # noqa: E402
from moe_infer.weights import open_weight_file  # noqa: E402

pytestmark = pytest.mark.needs_torch

ROOT = Path(__file__).resolve().parent.parent
CPU = ["CPUExecutionProvider"]


def _replaced(family: str, folder: Path, **options: Any) -> tuple[Any, moe_torch.ReplaceReport]:
    model = copy.deepcopy(model_zoo.make(family).model)
    report = moe_torch.replace_moe(model, folder / "experts.safetensors", **options)
    return model, report


def _export(model: Any, family: str, path: Path) -> list[str]:
    made = model_zoo.make(family)
    wrapped = model_zoo._Logits(model_zoo.Made(family, model, made.inputs, None))
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return moe_torch.export(
            wrapped,
            tuple(made.inputs.values()),
            path,
            input_names=list(made.inputs),
            output_names=["logits"],
            dynamic_shapes=(tuple(dims for _ in made.inputs),),
        )


@pytest.mark.parametrize("family", [f for f in model_zoo.FAMILIES if f != "Mixtral-square"])
def test_families(family: str, tmp_path: Path) -> None:
    """PyTorch before, PyTorch after, the exported graph on the CPU, at two lengths."""
    made, expected = model_zoo.make(family), model_zoo.expected(family)
    parameters = sum(p.numel() for p in made.model.parameters())
    model, report = _replaced(family, tmp_path)
    assert len(report.layers) == model_zoo.FAMILIES[family].moe_layers
    held = sum(
        int(np.prod(t.shape)) for t in open_weight_file(report.expert_weight_path).tensors.values()
    )
    assert held > 0
    assert sum(p.numel() for p in model.parameters()) == parameters - held
    with torch.no_grad():
        after = model(**made.inputs, use_cache=False).logits.numpy()
    np.testing.assert_allclose(after, expected, rtol=0, atol=1e-5)

    untyped = _export(model, family, tmp_path / "model.onnx")
    assert untyped == []
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    nodes = [node for node in graph.graph.node if node.op_type == "MoELayer"]
    assert len(nodes) == len(report.layers)
    typed = {info.name for info in graph.graph.value_info}
    for node, layer in zip(nodes, report.layers, strict=True):
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert moe_infer.LayerConfig.from_attributes(given).top_k == layer.config.top_k
        assert node.output[0] == digest_name(node.output[0], layer.config)
        assert node.output[0] in typed
    session = moe_infer.InferenceSession(tmp_path / "model.onnx", providers=CPU)
    (logits,) = session.run(None, made.arrays)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    (shorter,) = session.run(None, {n: a[:1, :3] for n, a in made.arrays.items()})
    np.testing.assert_allclose(shorter, logits[:1, :3], rtol=0, atol=1e-4)


def test_slots_are_looked_at_before_anything_is_changed(tmp_path: Path) -> None:
    model = copy.deepcopy(model_zoo.make("Mixtral").model)
    held = sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match="max_concurrency must be a number of experts from 1"):
        moe_torch.replace_moe(model, tmp_path / "out/experts.safetensors", max_concurrency=0)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file; give another path"):
        moe_torch.replace_moe(model, tmp_path / "file/experts.safetensors")
    assert sum(p.numel() for p in model.parameters()) == held


def test_finish_twice_is_finish_once(tmp_path: Path) -> None:
    model, _ = _replaced("Mixtral", tmp_path, max_concurrency=2)
    _export(model, "Mixtral", tmp_path / "model.onnx")
    once = (tmp_path / "model.onnx").read_bytes()
    moe_torch.finish(tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == once
    layers = moe_infer.inspect_model(tmp_path / "model.onnx")
    assert [layer.slots for layer in layers] == [2, 2]
    (tmp_path / "experts.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="layer '"):
        moe_torch.finish(tmp_path / "model.onnx")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(dtype: str, tmp_path: Path) -> None:
    """The file keeps the model's type, and the numbers stay as near as it allows."""
    made = model_zoo.make("Mixtral")
    model = copy.deepcopy(made.model).to(getattr(torch, dtype))
    with torch.no_grad():
        before = model(**made.inputs, use_cache=False).logits.float().numpy()
    report = moe_torch.replace_moe(model, tmp_path / "experts.safetensors")
    tensors = open_weight_file(report.expert_weight_path).tensors
    assert {t.dtype for t in tensors.values()} == {dtype}
    with torch.no_grad():
        after = model(**made.inputs, use_cache=False).logits.float().numpy()
    np.testing.assert_allclose(after, before, rtol=0, atol=0.15)


_GROUPS = {
    "n_group": 2,
    "topk_group": 1,
    "head_dim": 8,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
}
SHARED: dict[str, tuple[str, dict[str, Any]]] = {
    "Glm4Moe": ("sigmoid_topk", {**_GROUPS, "n_routed_experts": 8, "first_k_dense_replace": 1}),
    "Dots1": ("sigmoid_topk", {**_GROUPS, "n_routed_experts": 8, "first_k_dense_replace": 1}),
    "ExaoneMoe": ("sigmoid_topk", {**_GROUPS, "num_experts": 8}),
    "SolarOpen": ("sigmoid_topk", {**_GROUPS, "n_routed_experts": 8}),
    "FlexOlmo": ("softmax_topk", {"num_experts": 6}),
    "MiniMax": ("softmax_topk", {"num_local_experts": 4, "head_dim": 8}),
    "Jamba": (
        "softmax_topk",
        {"num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    ),
    "Qwen3Next": (
        "softmax_topk",
        {
            "num_experts": 6,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "GraniteMoeShared": ("topk_softmax", {"num_local_experts": 4, "shared_intermediate_size": 16}),
}


@pytest.mark.parametrize("name", SHARED)
def test_models_that_share_a_router(name: str, tmp_path: Path) -> None:
    """In PyTorch; their graphs are those of the families above."""
    router, sizes = SHARED[name]
    if not hasattr(transformers, f"{name}Config"):
        pytest.fail(f"transformers {transformers.__version__} has no {name}: 5.20 is needed")
    config = getattr(transformers, f"{name}Config")(**{**model_zoo._SIZES, **sizes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    if name == "Jamba" and not any("Router" in type(m).__name__ for m in model.modules()):
        pytest.skip("the router of this transformers' Jamba is no module of its own")
    model_zoo._randomise(model)
    ids = torch.randint(3, 64, (1, 6))
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        report = moe_torch.replace_moe(model, tmp_path / "experts.safetensors")
        after = model(input_ids=ids, use_cache=False).logits
    assert {layer.config.moe_variant for layer in report.layers} == {router}
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert before.abs().max() > 1


def test_an_activation_that_no_sub_layer_has(tmp_path: Path) -> None:
    model = copy.deepcopy(model_zoo.make("Mixtral").model)
    model.model.layers[1].mlp.experts.act_fn = nn.Tanh()
    with pytest.raises(ValueError, match=r"layers.1.mlp' .*has activation Tanh"):
        moe_torch.replace_moe(model, tmp_path / "experts.safetensors")
    assert not list(tmp_path.iterdir())


def test_switch(tmp_path: Path) -> None:
    """An encoder and a decoder, experts with tensors of their own, one expert a token."""
    config = transformers.SwitchTransformersConfig(
        vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_heads=4, num_layers=2,
        num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        num_experts=5, expert_capacity=64,
    )  # fmt: skip
    torch.manual_seed(2)
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    model_zoo._randomise(model)
    ids = {
        "input_ids": torch.randint(3, 64, (2, 7)),
        "decoder_input_ids": torch.randint(3, 64, (2, 5)),
    }
    with torch.no_grad():
        before = model(**ids, use_cache=False).logits
        report = moe_torch.replace_moe(model, tmp_path / "experts.safetensors")
        after = model(**ids, use_cache=False).logits
    assert [layer.config.expert_sublayer_type for layer in report.layers] == ["ReLU_FF"] * 2
    assert [layer.config.top_k for layer in report.layers] == [1, 1]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


# --- Adapters of a user


class _Own(nn.Module):
    """Two experts a token, softmax over the chosen; a gelu-gated expert with tensors of its own."""

    def __init__(self, experts: int = 5, d: int = 12, hidden: int = 8) -> None:
        super().__init__()
        self.score = nn.Linear(d, experts)
        self.gates = nn.ParameterList(torch.randn(hidden, d) for _ in range(experts))
        self.ups = nn.ParameterList(torch.randn(hidden, d) for _ in range(experts))
        self.down = nn.Parameter(torch.randn(experts, hidden, d))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        best, chosen = self.score(x).topk(2, -1)
        shares = torch.softmax(best, -1)
        every = torch.stack(
            [
                (nn.functional.gelu(x @ g.T, approximate="tanh") * (x @ u.T)) @ d
                for g, u, d in zip(self.gates, self.ups, self.down, strict=True)
            ],
            -2,
        )
        picked = every.gather(-2, chosen[..., None].expand(*chosen.shape, x.shape[-1]))
        return (picked * shares[..., None]).sum(-2)


class _OwnAdapter(moe_torch.MoEAdapter):
    classes = (_Own,)
    attributes: ClassVar[dict[str, Any]] = {"moe_variant": "topk_softmax", "top_k": 2}

    def describe(self, module: nn.Module) -> moe_torch.MoEDescription:
        experts, hidden, d_model = module.down.shape
        return moe_torch.MoEDescription(
            d_model,
            {
                "expert_count": experts,
                "hidden_size": hidden,
                "expert_sublayer_type": "Gated_GELU_Tanh",
                **self.attributes,
            },
            {
                "gate_weight": moe_torch.separate(list(module.gates)),
                "up_weight": moe_torch.separate(list(module.ups)),
                "down_weight": moe_torch.stacked(module.down, transpose=True),
            },
        )

    def install(self, module: nn.Module, layer: moe_torch.MoELayer) -> nn.Module:
        return moe_torch.RoutedExperts(module.score, layer)


def _own_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.LayerNorm(12), _Own(), nn.LayerNorm(12), _Own()).eval()


def test_an_adapter_of_ones_own(tmp_path: Path) -> None:
    model = _own_model()
    x = torch.randn(2, 3, 12)
    before = model(x).detach()
    with pytest.raises(ValueError, match=r"modules that look like one are _Own.*MoEAdapter"):
        moe_torch.replace_moe(model, tmp_path / "experts.safetensors")
    report = moe_torch.replace_moe(
        model, tmp_path / "experts.safetensors", adapters=[_OwnAdapter()]
    )
    assert "2 MoE modules replaced" in str(report)
    assert_close(model(x).detach().numpy(), before.numpy(), "float32")
    moe_torch.export(model, (x,), tmp_path / "model.onnx", input_names=["x"])
    session = moe_infer.InferenceSession(tmp_path / "model.onnx", providers=CPU)
    (y,) = session.run(None, {"x": x.numpy()})
    assert_close(y, before.numpy(), "float32")


def test_a_layer_that_is_the_graphs_output(tmp_path: Path) -> None:
    model = _own_model()
    x = torch.randn(6, 12)
    expected = model(x).detach().numpy()
    moe_torch.replace_moe(model, tmp_path / "e.safetensors", adapters=[_OwnAdapter()])
    moe_torch.export(model, (x,), tmp_path / "model.onnx", input_names=["x"], output_names=["y"])
    graph = onnx.load(tmp_path / "model.onnx").graph
    (output,) = graph.output
    assert output.name == "y"
    layers = [node for node in graph.node if node.op_type == "MoELayer"]
    assert all(".moe_" in node.output[0] for node in layers)
    once = (tmp_path / "model.onnx").read_bytes()
    moe_torch.finish(tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == once
    session = moe_infer.InferenceSession(tmp_path / "model.onnx", providers=CPU)
    assert_close(session.run(None, {"x": x.numpy()})[0], expected, "float32")


def test_registered_adapters_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_infer.torch import adapter

    monkeypatch.setattr(adapter, "_REGISTERED", [])
    moe_torch.register_adapter(_OwnAdapter())
    assert len(moe_torch.replace_moe(_own_model(), tmp_path / "e.safetensors").layers) == 2
    with pytest.raises(TypeError, match="must be an instance of MoEAdapter"):
        moe_torch.register_adapter(_OwnAdapter)  # type: ignore[arg-type]


def test_a_wrong_description_is_noticed(tmp_path: Path) -> None:
    class Wrong(_OwnAdapter):
        attributes: ClassVar[dict[str, Any]] = {"moe_variant": "softmax_topk", "top_k": 2}

    with pytest.raises(ValueError, match=r"module '1' does not compute what it did"):
        moe_torch.replace_moe(_own_model(), tmp_path / "e.safetensors", adapters=[Wrong()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 9}, "module '1' .*'top_k' is 9, but there are only 5 experts"),
        ({"hidden_size": 7}, r"'gate_weight' of expert 0 has shape \(8, 12\), needed is \(7, 12\)"),
        ({"expert_bias": 1}, "gives no 'gate_bias'"),
        ({"experts": 3}, "unknown attribute 'experts'"),
    ],
)
def test_errors_before_anything_changes(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    class Changed(_OwnAdapter):
        attributes: ClassVar[dict[str, Any]] = {**_OwnAdapter.attributes, **change}

    model = _own_model()
    x = torch.randn(1, 2, 12)
    before = model(x)
    with pytest.raises(ValueError, match=message):
        moe_torch.replace_moe(model, tmp_path / "e.safetensors", adapters=[Changed()])
    assert torch.equal(model(x), before)
    assert not list(tmp_path.iterdir())


def test_what_a_file_cannot_hold(tmp_path: Path) -> None:
    model = _own_model()
    with pytest.raises(ValueError, match="is in training mode"):
        moe_torch.replace_moe(model.train(), tmp_path / "e.safetensors")
    adapters = [_OwnAdapter()]
    with pytest.raises(ValueError, match=r"is torch.float64; a weight file holds float32"):
        moe_torch.replace_moe(model.double().eval(), tmp_path / "e.safetensors", adapters=adapters)
    with pytest.raises(ValueError, match="is on the meta device"):
        moe_torch.replace_moe(model.to("meta"), tmp_path / "e.safetensors", adapters=adapters)


def test_torchscript_is_refused(tmp_path: Path) -> None:
    model = _own_model()
    moe_torch.replace_moe(model, tmp_path / "e.safetensors", adapters=[_OwnAdapter()])
    with pytest.raises(RuntimeError, match="dynamo=True"):
        torch.jit.trace(model, torch.randn(1, 2, 12))


# --- Memory

_MEMORY = """
import json, sys, threading, time
import torch, transformers
import moe_infer.torch as moe_torch

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

config = transformers.MixtralConfig(
    vocab_size=64, hidden_size=512, intermediate_size=1024, num_hidden_layers=6,
    num_attention_heads=4, num_key_value_heads=2, num_local_experts=8)
with torch.no_grad():
    model = transformers.MixtralForCausalLM(config).eval()
# Loads what is loaded once: the writer, the eager operator.
small = transformers.MixtralForCausalLM(transformers.MixtralConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)).eval()
moe_torch.replace_moe(small, sys.argv[1] + "/small.safetensors")
samples, stop = [], threading.Event()
def watch():
    while not stop.is_set():
        samples.append(anonymous())
        time.sleep(0.002)
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
report = moe_torch.replace_moe(model, sys.argv[1] + "/experts.safetensors")
stop.set()
thread.join()
print(json.dumps({
    "before": before, "peak": max(samples), "after": anonymous(), "samples": len(samples),
    "experts": sum(layer.nbytes for layer in report.layers)}))
"""


def test_never_two_copies(tmp_path: Path) -> None:
    """Of 302 MB of experts: the peak is one stacked tensor above, and afterwards they are gone."""
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["experts"] == 6 * 8 * 3 * 512 * 1024 * 4
    assert told["samples"] > 20
    assert told["peak"] < told["before"] + 0.15 * told["experts"], told
    assert told["after"] < told["before"] - 0.85 * told["experts"], told
