"""Loops over experts in transformers 5, as TorchScript traces them: one MoE block of each model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import moe_infer  # noqa: E402
from compare_rewrites import TOLERANCE, check_same, refused, run_lowered  # noqa: E402

pytestmark = pytest.mark.needs_torch

D_MODEL, HIDDEN, EXPERTS = 16, 8, 4


def _mixtral() -> Any:
    from transformers.models.mixtral import modeling_mixtral

    config = transformers.MixtralConfig(
        hidden_size=D_MODEL,
        intermediate_size=HIDDEN,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    config._experts_implementation = "eager"
    return modeling_mixtral.MixtralSparseMoeBlock(config)


def _gpt_oss() -> Any:
    from transformers.models.gpt_oss import modeling_gpt_oss

    config = transformers.GptOssConfig(
        hidden_size=D_MODEL,
        intermediate_size=HIDDEN,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    config._experts_implementation = "eager"
    return _First(modeling_gpt_oss.GptOssMLP(config))


def _switch() -> Any:
    from transformers.models.switch_transformers import modeling_switch_transformers

    config = transformers.SwitchTransformersConfig(
        d_model=D_MODEL, d_ff=HIDDEN, num_experts=EXPERTS, expert_capacity=3
    )
    return modeling_switch_transformers.SwitchTransformersSparseMLP(config)


def _nllb() -> Any:
    from transformers.models.nllb_moe import modeling_nllb_moe

    config = transformers.NllbMoeConfig(d_model=D_MODEL, num_experts=EXPERTS)
    return modeling_nllb_moe.NllbMoeSparseMLP(config, HIDDEN)


class _First(torch.nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Any) -> Any:
        return self.module(x)[0]


def _randomised(module: Any) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        for name, value in module.named_parameters():
            width = min(value.shape[-2:]) if value.dim() > 1 else 1
            value.normal_(0, (0.3 if name.endswith("bias") else 1.2) / width**0.5)
    return module.eval()


def _export(module: Any, x: Any, folder: Path) -> Path:
    path = folder / "in" / "model.onnx"
    path.parent.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (x,),
            str(path),
            dynamo=False,
            input_names=["x"],
            dynamic_axes={"x": {0: "batch", 1: "seq"}},
            opset_version=18,
        )
    return path


MODELS = {
    "Mixtral": (_mixtral, "Gated_SiLU", "softmax_topk"),
    "gpt-oss": (_gpt_oss, "Clamped_SwiGLU", "topk_softmax"),
    "Switch": (_switch, "ReLU_FF", "softmax_topk"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_loop_over_all_experts_is_rewritten(name: str, tmp_path: Path) -> None:
    make, sublayer, router = MODELS[name]
    module = _randomised(make())
    x = torch.randn(3, 20, D_MODEL)
    path = _export(module, x, tmp_path)
    report = moe_infer.rewrite(path, tmp_path / "out")
    assert len(report.layers) == 1, str(report)
    (layer,) = report.layers
    assert layer.family == "unrolled"
    assert (layer.config.expert_sublayer_type, layer.config.moe_variant) == (sublayer, router)
    assert report.model_path is not None
    # The traced graph fails where an expert has no token; the rewritten one does not.
    check_same(path, report.model_path, [{"x": x.numpy()}])
    for batch, seq in ((3, 20), (1, 1), (2, 5)):
        shorter = x[:batch, :seq].contiguous()
        with torch.no_grad():
            expected = module(shorter).numpy()
        (made,) = run_lowered(report.model_path, {"x": shorter.numpy()})
        np.testing.assert_allclose(made, expected, rtol=0, atol=TOLERANCE)


def test_a_loop_over_some_experts_is_refused(tmp_path: Path) -> None:
    """The weights are stacked and taken by the number of the chosen expert, so none is missing by
    name; but there are two passes, and the graph fails for every other number of experts."""
    module = _randomised(_mixtral())
    report = refused(_export(module, torch.randn(1, 1, D_MODEL), tmp_path), tmp_path)
    assert report.wrong_export
    assert "holds 2 of 4 experts:" in report.near_misses[0].reason


def test_nllb_computes_two_experts_only_and_is_refused(tmp_path: Path) -> None:
    module = _randomised(_nllb())
    x = torch.randn(3, 20, D_MODEL)
    with torch.no_grad():
        before = module(x)
        for e in (2, 3):
            for value in module.experts[f"expert_{e}"].parameters():
                value.zero_()
        assert torch.equal(module(x), before), "transformers has mended it: take the family in"
    report = refused(_export(module, x, tmp_path), tmp_path)
    assert report.wrong_export
    assert "only experts 0 and 1 are ever computed" in report.near_misses[0].reason
